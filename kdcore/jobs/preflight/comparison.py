"""Preflight of compare specs: that of each arm, and the time of all cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore.components.registry import Registry, installed
from kdcore.errors import Mistakes, UserError
from kdcore.jobs.comparison.cells import cells_by_arm, shared_files
from kdcore.jobs.preflight.report import Report
from kdcore.runs.comparison_results import refuse_unmeasured
from kdcore.runs.folder import Run
from kdcore.specs.compare import CompareSpec
from kdcore.specs.parts.changes import changed, has, nested


def preflight_arms(spec: CompareSpec, *, registry: Registry | None = None) -> dict[str, Any]:
    """Resolve each arm of a comparison, and estimate the cost of one seed.

    Args:
        spec: The compare spec.
        registry: The components that the spec may name (default: the installed ones).

    Returns:
        Arm -> findings of its job's preflight, a `Report` for kdcore's own jobs; empty for a job
        without a preflight. Controls cost as much as their arm.

    Raises:
        UserError: An arm could not start; the message begins with its name.
    """
    registry = registry or installed()
    Run(spec.run).refuse_foreign()
    refuse_unmeasured("choose_by", spec.choose_by, spec.base.job)
    job, point = registry.job(spec.base.job), nested(spec.points[0])
    reports: dict[str, Any] = {}
    if job.preflight is None:
        return reports
    for arm, changes in spec.arms.items():
        try:
            reports[arm] = job.look_ahead(
                changed(changed(spec.base, changes), point), registry=registry
            )
        except UserError as wrong:
            raise _of_cells(wrong, f"arm '{arm}'", changes, f"arms.{arm}") from wrong
    if spec.validation:
        try:
            tried = changed(spec.base, {"data": {"heldout": spec.validation.dump()}})
            job.look_ahead(tried, registry=registry)
        except UserError as wrong:
            heldout = {"data": {"heldout": None}}
            raise _of_cells(wrong, "validation", heldout, "validation") from wrong
    return reports


def _of_cells(wrong: UserError, cells: str, changes: dict[str, Any], place: str) -> UserError:
    """The mistakes of a cell's spec, with the fields of the comparison's.

    ``cells``: what to call the cells; ``changes``: what they change in the base, at ``place``.
    """

    def field(of_cell: str) -> str:
        if not of_cell or not has(changes, of_cell):
            return of_cell and f"base.{of_cell}"
        return place if place == "validation" else f"{place}.{of_cell}"

    found = wrong.found if isinstance(wrong, Mistakes) else [wrong]
    told = [UserError(f"{cells}: {m.cause}", m.cure, field(m.field)) for m in found]
    return told[0] if len(told) == 1 else Mistakes(told)


def total_seconds(spec: CompareSpec, reports: Mapping[str, Report]) -> float:
    """Estimate the time of all cells, one after the other.

    Args:
        spec: The compare spec.
        reports: Arm -> the findings about one of its cells.

    Returns:
        Seconds; what cells share in one folder is computed once, by the first one.
    """
    cells, total = cells_by_arm(spec), 0.0
    once: dict[tuple[str, str], float] = {}
    for arm, report in reports.items():
        shared = shared_files(changed(changed(spec.base, spec.arms[arm]), nested(spec.points[0])))
        for purpose, seconds in report.seconds.items():
            if purpose in shared:
                key = purpose, shared[purpose]
                once[key] = max(seconds, once.get(key, 0.0))
            else:
                total += cells[arm] * seconds
    return total + sum(once.values())
