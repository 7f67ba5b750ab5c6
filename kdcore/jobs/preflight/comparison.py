"""Preflight of compare specs: that of each arm, and the time of all cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from kdcore.jobs.comparison.cell_fields import VALIDATION, in_comparison
from kdcore.jobs.comparison.cells import cells_by_arm, shared_files
from kdcore.jobs.comparison.shared_states import refuse_other_states
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
    Run(spec.run, planned=True).refuse_foreign()
    refuse_unmeasured("choose_by", spec.choose_by, spec.base.job)
    job = registry.job(spec.base.job)
    reports: dict[str, Any] = {}
    if job.preflight is None:
        return reports
    refuse_other_states(spec, registry)
    for arm in spec.arms:
        try:
            reports[arm] = job.look_ahead(spec.at_point(arm, 0), registry=registry)
        except UserError as wrong:
            raise in_comparison(wrong, spec, arm, 0, called=f"arm '{arm}'") from wrong
    if spec.validation:
        try:
            tried = changed(spec.base, {"data": {"heldout": spec.validation.dump()}})
            job.look_ahead(tried, registry=registry)
        except UserError as wrong:
            raise in_comparison(wrong, spec, "", 0, VALIDATION, "validation") from wrong
    return reports


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
