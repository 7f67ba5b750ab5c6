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
from kdcore.specs.parts.changes import changed


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
    job = registry.job(spec.base.job)
    reports: dict[str, Any] = {}
    if job.preflight is None:
        return reports
    for arm, changes in spec.arms.items():
        try:
            reports[arm] = job.look_ahead(spec.at_point(arm, 0), registry=registry)
        except UserError as wrong:
            grid = {path: f"grid.{path}" for path in spec.grids[arm]}
            raise _of_cells(wrong, f"arm '{arm}'", grid, {f"arms.{arm}": changes}) from wrong
    if spec.validation:
        try:
            tried = changed(spec.base, {"data": {"heldout": spec.validation.dump()}})
            job.look_ahead(tried, registry=registry)
        except UserError as wrong:
            raise _of_cells(wrong, "validation", {"data.heldout": "validation"}, {}) from wrong
    return reports


def _of_cells(
    wrong: UserError, cells: str, fields: Mapping[str, str], changes: Mapping[str, Any]
) -> UserError:
    """The mistakes of a cell's spec, with the fields of the comparison's.

    ``cells``: what to call the cells; ``fields``: field of the cell -> field of the comparison with
    its value; ``changes``: field of the comparison -> what it changes in the base.
    """

    def field(of_cell: str) -> str:
        for path, place in fields.items():
            if _is_part(of_cell, path) or _is_part(path, of_cell):
                return place + of_cell[len(path) :]
        where = next((each for each, made in changes.items() if _is_set(made, of_cell)), "base")
        return f"{where}.{of_cell}"

    found = wrong.found if isinstance(wrong, Mistakes) else [wrong]
    told = [
        UserError(
            f"{cells}: {m.cause.removeprefix(f'{m.field}: ')}", m.cure, m.field and field(m.field)
        )
        for m in found
    ]
    return told[0] if len(told) == 1 else Mistakes(told)


def _is_part(field: str, whole: str) -> bool:
    return f"{field}.".startswith(f"{whole}.")


def _is_set(changes: Any, field: str) -> bool:
    """Whether changes set a field, what is inside it, or what it is part of."""
    for key in field.split("."):
        if isinstance(changes, list):
            changes = dict(zip(map(str, range(len(changes))), changes, strict=True))
        if not isinstance(changes, dict) or "name" in changes:
            return True  # a component is replaced whole
        if key not in changes:
            return False
        changes = changes[key]
    return True


def total_seconds(spec: CompareSpec, reports: Mapping[str, Report]) -> float:
    """Estimate the time of all cells, one after the other.

    Args:
        spec: The compare spec.
        reports: Arm -> the findings about one of its cells.

    Returns:
        Seconds; what cells share in one folder is computed once, by the first one, and takes as
        long at each point of the grid.
    """
    cells, total = cells_by_arm(spec), 0.0
    once: dict[tuple[str, str], float] = {}
    for arm, report in reports.items():
        points = range(len(spec.points_of(arm)))
        shared = [shared_files(spec.at_point(arm, point)) for point in points]
        for purpose, seconds in report.seconds.items():
            keys = {files[purpose] for files in shared if purpose in files}
            for key in keys:
                once[purpose, key] = max(seconds, once.get((purpose, key), 0.0))
            if not keys:
                total += cells[arm] * seconds
    return total + sum(once.values())
