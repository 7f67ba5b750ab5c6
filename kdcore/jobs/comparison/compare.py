"""The compare job: train by several methods with the same data, budget and seeds.

A cell is one arm with one seed: an ordinary run in its own process, so that a failed cell does not
stop the others and its peak memory is measured alone. Cells of equal seed read the same rows in the
same order; responses of a teacher or target are generated once for all cells. With a grid, each arm
first runs at every grid point, on rows and with seeds that are not reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.components.choice import Choice, choices
from kdcore.components.registry import THIS_PROGRAM, Registry, installed
from kdcore.errors import UserError, nearest
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.jobs.comparison.cell_process import Cell, logged, run_cell
from kdcore.models.assembly import Assembly
from kdcore.runs.comparison_results import (
    COMPARISON,
    Arm,
    ChosenBy,
    Comparison,
    GridPoint,
    refuse_unmeasured,
)
from kdcore.runs.folder import CELLS, Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import (
    CELL_COST,
    HELDOUT_ROWS,
    Cost,
    Difference,
    Measured,
    Metric,
    TrainingResults,
    means_over,
)
from kdcore.specs.compare import CellSpec, CompareSpec, changed, nested
from kdcore.specs.parts.training import KeptResponsesSpec

CONTROLS = 3
"""Number of control arms of an arm with one gate; see `_control_gates`."""


def compare(
    spec: CompareSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run every cell that is not done yet, and write ``comparison.json``.

    A failed cell is recorded with its reason, and the other cells continue. A line that several
    cells note is shown once.

    Args:
        spec: The compare spec.
        registry: The installed components; each cell's process loads the same ones.
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished comparison is continued.
        progress: The display of stages and notes (default: none).

    Returns:
        The run, whose ``comparison.json`` holds the results.

    Raises:
        UserError: `kdcore.runs.folder.Run.open` refuses the folder, a component is not installed,
            no cell of the baseline succeeds, ``choose_by`` names a metric that is not measured, or
            a model or row file changed since other cells read it.
    """
    registry = registry or installed()
    progress = progress or Silent()
    _refuse_uninstalled(spec, registry)
    refuse_unmeasured("choose_by", spec.choose_by, spec.base.job)
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        _note_chosen_on(spec, registry, progress)
        failures: dict[str, str] = {}
        cells: list[Cell] = []
        notes: set[str] = set()

        def note(cell: Cell, line: str) -> None:
            if line not in notes:
                notes.add(line)
                progress.note(f"{cell.name}: {line}")

        with progress.stage("cells", _cells_in_all(spec)) as stage:
            for cell in _cells(spec, run, registry):
                cells.append(cell)
                reason = None if cell.done else run_cell(cell.spec, registry, partial(note, cell))
                if reason:
                    failures[cell.name] = reason
                    progress.note(f"{cell.name} failed: {reason}")
                stage.advance()
        run.write(COMPARISON, _outcome(spec, cells, failures))
    return run


def _refuse_uninstalled(spec: CompareSpec, registry: Registry) -> None:
    """Raises UserError for a component that a cell's process cannot load."""
    arms = [changed(spec.base, arm, {"registry": registry}) for arm in spec.arms.values()]
    for _, choice in choices(arms):
        if registry.plugin_of(choice.kind, choice.name).distribution == THIS_PROGRAM:
            raise UserError(
                f"the {choice.kind} '{choice.name}' is not installed; each cell of a comparison "
                "runs in its own process, which loads installed plugins only",
                "install it as a plugin (kdcore plugins new), or run each arm by itself",
            )


def _note_chosen_on(spec: CompareSpec, registry: Registry, progress: Progress) -> None:
    """Note it when grid points are chosen on reported rows, which makes the figures optimistic."""
    reported = spec.base.data.heldout
    if spec.validation is None or reported is None:
        return
    assembly = Assembly(registry)
    sources = (assembly.build(each) for each in (reported, spec.validation))
    rows, chosen_on = (_contents(source.read()) for source in sources)
    if shared := len(rows & chosen_on):
        progress.note(
            f"{shared} of {len(rows)} held-out rows are also in validation, which chooses the grid "
            "points; this makes the reported figures optimistic"
        )


def _contents(examples: Sequence[Any]) -> set[Any]:
    """The contents of examples without their ids; examples that cannot be hashed are left out."""
    found = set()
    for each in examples:
        with suppress(TypeError):  # not a dataclass, or one that holds lists
            found.add(replace(each, id=""))
    return found


def _cells_in_all(spec: CompareSpec) -> int:
    """The number of `_cells` if none fails and no grid point changes the gates."""
    trials = len(spec.points) * spec.trials if spec.grid else 0
    arms = [changed(spec.base, arm) for arm in spec.arms.values()]
    controlled = sum(_is_controlled(spec, arm) for arm in arms)
    return len(arms) * trials + (len(arms) + CONTROLS * controlled) * len(spec.seeds)


def _is_controlled(spec: CompareSpec, arm: CellSpec) -> bool:
    """Whether an arm gets controls: it needs exactly one gate, whose rate the controls match."""
    return spec.controls and len(_gates(arm)) == 1


def _gates(spec: CellSpec) -> list[Choice]:
    """The gates of a spec's method; none for a job without a method."""
    found: list[Choice] = getattr(getattr(spec, "method", None), "gates", [])
    return found


def _cells(spec: CompareSpec, run: Run, registry: Registry) -> Iterator[Cell]:
    """Yield all trials, then each arm at its best point, then its controls, which need its rates.

    The trials come first because the other cells add responses for their own held-out prompts to
    the shared file of responses.
    """
    trials = {arm: _trials(spec, run, arm) for arm in spec.arms}
    for each in trials.values():
        for cell in each:
            yield cell
            _refuse_unmeasured(spec, cell)
    for arm in spec.arms:
        point = _best(spec, trials[arm])
        if point is None:
            continue
        own = [_cell(spec, run, arm, point, seed) for seed in spec.seeds]
        yield from own
        if _is_controlled(spec, own[0].spec):
            for cell in own:
                for control, gate in _control_gates(cell, registry).items():
                    name = f"{arm}+{control}"
                    place = str(_folder(spec, run, name, point, cell.seed))
                    changes = {"method": {"gates": [gate]}, "run": place}
                    yield Cell(name, cell.seed, point, changed(cell.spec, changes))


def _trials(spec: CompareSpec, run: Run, arm: str) -> list[Cell]:
    """The trial cells of an arm, one per grid point and trial seed; none without a grid."""
    if not spec.validation:
        return []
    rows = {"heldout": spec.validation.dump()}
    return [
        _cell(spec, run, arm, place, seed, rows, trial=True)
        for place in range(len(spec.points))
        for seed in spec.trial_seeds
    ]


def _cell(
    spec: CompareSpec,
    run: Run,
    arm: str,
    point: int,
    seed: int,
    data: Mapping[str, Any] | None = None,
    *,
    trial: bool = False,
) -> Cell:
    at_point = changed(changed(spec.base, spec.arms[arm]), nested(spec.points[point]))
    rows = dict(data or {})
    responses = getattr(at_point.data, "responses", None)
    if isinstance(responses, KeptResponsesSpec):
        rows["responses"] = {"folder": str(responses.folder or run.path("responses"))}
    own = {"run": str(_folder(spec, run, arm, point, seed)), "seed": seed, "data": rows}
    return Cell(arm, seed, point, changed(at_point, own), trial)


def _folder(spec: CompareSpec, run: Run, arm: str, point: int, seed: int) -> Path:
    at = [f"point-{point}"] if spec.grid else []
    return run.path(CELLS, arm, *at, f"seed-{seed}")


def _refuse_unmeasured(spec: CompareSpec, cell: Cell) -> None:
    """Raises UserError, already after the first cell, when ``choose_by`` was not measured."""
    known = [each.name for each in _metrics_of([cell.results()])]
    if known and spec.choose_by and spec.choose_by not in known:
        raise UserError(
            f"choose_by names '{spec.choose_by}', which was not measured",
            nearest(spec.choose_by, known),
        )


def _best(spec: CompareSpec, trials: Sequence[Cell]) -> int | None:
    """The first grid point with the best mean over its trials; None when every point failed.

    Without a grid there is only point 0.
    """
    if not trials:
        return 0
    metric = _deciding(spec, [cell.results() for cell in trials])
    if metric is None:
        return None
    means = [figures.get(metric.name, math.nan) for figures in _figures(spec, trials)]
    finite = {point: mean for point, mean in enumerate(means) if math.isfinite(mean)}
    if not finite:
        return None
    return (min if metric.better == "lower" else max)(finite, key=finite.__getitem__)


def _figures(spec: CompareSpec, trials: Sequence[Cell]) -> list[dict[str, float]]:
    """The mean figures of each grid point over its trials; {} where a trial failed."""
    found = [
        [cell.results().after for cell in trials if cell.point == point]
        for point in range(len(spec.points))
    ]
    return [means_over(each) if all(each) else {} for each in found]


def _deciding(spec: CompareSpec, results: Sequence[TrainingResults]) -> Metric | None:
    """The metric that chooses the grid point; None where nothing was measured."""
    metrics = _metrics_of(results)
    return next((each for each in metrics if spec.choose_by in (None, each.name)), None)


def _metrics_of(results: Sequence[TrainingResults]) -> list[Metric]:
    """The metrics of all cells, each once, in the order of the first cell that has it."""
    metrics = {each.name: each for one in results for each in one.metrics}
    return list(metrics.values())


def _control_gates(cell: Cell, registry: Registry) -> dict[str, dict[str, Any]]:
    """The gates that an arm's gate must beat: random, uniform, inverted; {} for a failed cell."""
    lines = logged(cell.spec.run)
    (gate,) = _gates(cell.spec)
    rates = [line[f"acceptance/{gate.name}"] for line in lines if f"acceptance/{gate.name}" in line]
    if not rates:
        return {}
    rate = min(max(float(np.mean(rates)), 0.0), 1.0)
    floor = float(getattr(Assembly(registry).build(gate), "floor", 0.0))
    return {
        "random": {"name": "random", "rate": rate, "floor": floor},
        "uniform": {"name": "uniform", "weight": rate + (1 - rate) * floor},
        "inverted": {"name": "inverted", "gate": gate.dump()},
    }


def _outcome(spec: CompareSpec, cells: Sequence[Cell], failures: Mapping[str, str]) -> Comparison:
    """Each arm's mean figures and cost over seeds, and its differences from baseline and controls.

    Raises:
        UserError: No cell of the baseline succeeded.
    """
    baseline = spec.baseline or next(iter(spec.arms))
    done = [cell for cell in cells if cell.done and not cell.trial]
    measured: dict[str, dict[int, Measured]] = {}
    for cell in done:
        measured.setdefault(cell.arm, {})[cell.seed] = _measured(cell)
    theirs = measured.get(baseline)
    if theirs is None:
        raise UserError(
            f"every cell of the baseline '{baseline}' failed: {'; '.join(failures.values())}",
            "fix that, then rerun with resume=True",
        )
    done.sort(key=lambda cell: cell.arm != baseline)  # the baseline's metrics are shown first
    controls = dict.fromkeys(cell.arm for cell in cells if "+" in cell.arm)
    names = [
        name
        for arm in spec.arms
        for name in (arm, *(each for each in controls if each.startswith(f"{arm}+")))
    ]
    rows: list[Arm] = []
    told, flattered = dict(failures), []
    for arm in names:
        own = [cell for cell in done if cell.arm == arm]
        if any(cell.results().kept_by_these_rows for cell in own):
            flattered.append(arm)
        trials = [cell for cell in cells if cell.arm == arm and cell.trial]
        row = _with_choice(Arm(arm, [cell.seed for cell in own]), spec, trials)
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
    metric = _deciding(spec, [cell.results() for cell in cells if cell.trial])
    chosen_by = None
    if spec.validation and metric:
        chosen_by = ChosenBy(metric, spec.validation.dump(), spec.trial_seeds)
    return Comparison(
        baseline=baseline,
        seeds=spec.seeds,
        metrics=_metrics_of([cell.results() for cell in done]),
        arms=rows,
        failures=told,
        kept_by_these_rows=flattered,
        chosen_by=chosen_by,
    )


def _with_choice(arm: Arm, spec: CompareSpec, trials: Sequence[Cell]) -> Arm:
    """Return the arm with its grid points, their figures and the chosen point."""
    if not trials:
        return arm
    best = _best(spec, trials)
    return replace(
        arm,
        grid=[*map(GridPoint, spec.points, _figures(spec, trials))],
        chosen=None if best is None else spec.points[best],
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
