"""The results of a comparison, from the cells that have ended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from kdcore.errors import RERUN, UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.jobs.comparison.cells import (
    Cell,
    best_point,
    deciding_metric,
    metrics_of,
    trial_figures,
)
from kdcore.runs.comparison_results import Arm, ChosenBy, Comparison, GridPoint
from kdcore.runs.inputs import refuse_mixed
from kdcore.runs.results import CELL_COST, HELDOUT_ROWS, Cost, Difference, Measured, means_over
from kdcore.specs.compare import CompareSpec


def outcome(spec: CompareSpec, cells: Sequence[Cell]) -> Comparison:
    """Each arm's mean figures and cost over seeds, and its differences from baseline and controls.

    Args:
        spec: The compare spec.
        cells: All cells.

    Returns:
        The results.

    Raises:
        UserError: No cell of the baseline succeeded, or cells have read other inputs.
    """
    refuse_mixed(cell.run for cell in cells if cell.done)
    failures = {cell.name: failure for cell in cells if (failure := cell.failure) is not None}
    baseline = spec.baseline or next(iter(spec.arms))
    done = [cell for cell in cells if cell.done and not cell.trial]
    measured: dict[str, dict[int, Measured]] = {}
    for cell in done:
        measured.setdefault(cell.arm, {})[cell.seed] = _measured(cell)
    theirs = measured.get(baseline)
    if theirs is None:
        lost = [failures[c.name] for c in cells if c.arm == baseline and c.name in failures]
        causes = dict.fromkeys(line for each in lost for line in each.cause.splitlines())
        cures = dict.fromkeys(cure for each in lost for cure in re.split("\n|; ", each.cure))
        raise UserError(
            f"every cell of the baseline '{baseline}' failed: {'; '.join(causes)}",
            "; ".join(cures | {RERUN: None}),
        )
    done.sort(key=lambda cell: cell.arm != baseline)  # the baseline's metrics are shown first
    controls = dict.fromkeys(cell.arm for cell in cells if "+" in cell.arm)
    names = [
        name
        for arm in spec.arms
        for name in (arm, *(each for each in controls if each.startswith(f"{arm}+")))
    ]
    rows: list[Arm] = []
    told, flattered = {name: str(failure) for name, failure in failures.items()}, []
    for arm in names:
        own = [cell for cell in done if cell.arm == arm]
        if any(cell.results().kept_by_these_rows for cell in own):
            flattered.append(arm)
        trials = [cell for cell in cells if cell.arm == arm and cell.trial]
        lacks = spec.lacks(arm) if arm in spec.arms else []
        row = _with_choice(Arm(arm, [cell.seed for cell in own], lacks=lacks), spec, trials)
        if ours := measured.get(arm):
            row = replace(
                row,
                figures=means_over([each.means() for each in ours.values()]),
                cost=_mean_cost(own),
                controls={  # a gate is judged by its advantage over its own controls
                    name.removeprefix(f"{arm}+"): _differences(ours, measured[name], spec.draws)
                    for name in controls
                    if name.startswith(f"{arm}+") and name in measured
                },
            )
            try:
                row = replace(row, differences=_differences(ours, theirs, spec.draws))
            except ValueError:
                told[arm] = f"not compared: measured on different rows than '{baseline}'"
        rows.append(row)
    metric = deciding_metric(spec, [cell.results() for cell in cells if cell.trial])
    chosen_by = None
    if spec.validation and metric:
        chosen_by = ChosenBy(metric, spec.validation.dump(), spec.trial_seeds)
    return Comparison(
        baseline=baseline,
        seeds=spec.seeds,
        metrics=metrics_of([cell.results() for cell in done]),
        arms=rows,
        failures=told,
        kept_by_these_rows=flattered,
        chosen_by=chosen_by,
    )


def _with_choice(arm: Arm, spec: CompareSpec, trials: Sequence[Cell]) -> Arm:
    """Return the arm with its grid points, their figures and the chosen point."""
    if not trials:
        return arm
    best, points = best_point(spec, trials), spec.points_of(arm.arm)
    return replace(
        arm,
        grid=[*map(GridPoint, points, trial_figures(spec, trials))],
        chosen=None if best is None else points[best],
    )


def _differences(
    ours: Mapping[int, Measured], theirs: Mapping[int, Measured], draws: int
) -> dict[str, Difference]:
    """Differences over the shared seeds. Raises ValueError when the held-out rows differ."""
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return {}
    return paired_differences([ours[s] for s in shared], [theirs[s] for s in shared], draws)


def _measured(cell: Cell) -> Measured:
    """Read the held-out rows of a done cell. Raises UserError when the file lacks them."""
    rows = cell.run.read(HELDOUT_ROWS)
    if rows is None or rows.after is None:
        raise UserError(
            f"{cell.run.path(HELDOUT_ROWS.name)} does not contain the held-out rows of {cell.name}",
            f"remove {cell.run.folder}, then rerun with resume=True",
        )
    return rows.after


def _mean_cost(cells: Sequence[Cell]) -> Cost:
    """The mean cost of done cells; a value that one cell lacks is left out."""
    costs = [cell.run.read(CELL_COST) or Cost() for cell in cells]
    known = [{n: v for n, v in asdict(cost).items() if v is not None} for cost in costs]
    return Cost(**means_over(known))
