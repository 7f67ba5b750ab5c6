"""Several methods, the same data, budget and seeds: which one helps, and at what cost.

A cell is one arm with one seed: an ordinary run in a process of its own, so that a cell that fails
takes nothing with it and its peak memory is its own. Cells of equal seed see the same rows in the
same order; responses that a teacher or target generates are generated once for all. With a grid,
each arm first runs at every point of it, on rows and with a seed that are not reported.
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

from kdcore.errors import UserError, nearest
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.jobs.cell_process import Cell, logged, run_cell
from kdcore.method.choice import Choice, choices
from kdcore.method.registry import THIS_PROGRAM, Registry, installed
from kdcore.models.assembly import Assembly
from kdcore.runs.comparison_results import COMPARISON, Arm, ChosenBy, Comparison, GridPoint
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
)
from kdcore.specs.compare import CellSpec, CompareSpec, changed, nested
from kdcore.specs.training import KeptResponsesSpec

CONTROLS = 3
"""Arms beside one with a gate, as `_control_gates` names them."""


def compare(
    spec: CompareSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run every cell that is not done yet; the folder's ``comparison.json`` holds the outcome.

    A cell that fails is recorded with its reason, and the others go on. What cells note is told
    once, however many of them note it.

    registry: what is installed; each cell finds the same in its own process.

    Raises UserError as `kdcore.runs.folder.Run.open` does, for a component that is not installed
    (`kdcore.method.registry.registry_with`), when no cell of the baseline is done, when the grid is
    to be chosen by a figure that the cells do not have, or when a cell would read other models or
    rows than those that are done did by the same names.
    """
    registry = registry or installed()
    progress = progress or Silent()
    _refuse_uninstalled(spec, registry)
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
    """Raises UserError for a component that the process of a cell would not find."""
    arms = [changed(spec.base, arm, {"registry": registry}) for arm in spec.arms.values()]
    for _, choice in choices(arms):
        if registry.plugin_of(choice.kind, choice.name).distribution == THIS_PROGRAM:
            raise UserError(
                f"the {choice.kind} '{choice.name}' is not installed, and each cell of a "
                "comparison runs in a process of its own, which finds what is installed",
                "install it as a plugin (kdcore plugins new), or run each arm by itself",
            )


def _note_chosen_on(spec: CompareSpec, registry: Registry, progress: Progress) -> None:
    """Say so when points are chosen on rows that are reported: the figures would flatter."""
    reported = spec.base.data.heldout
    if spec.validation is None or reported is None:
        return
    assembly = Assembly(registry)
    sources = (assembly.build(each) for each in (reported, spec.validation))
    rows, chosen_on = (_contents(source.read()) for source in sources)
    if shared := len(rows & chosen_on):
        progress.note(
            f"{shared} of {len(rows)} held-out rows are chosen on as well (validation), which "
            "flatters the figures"
        )


def _contents(examples: Sequence[Any]) -> set[Any]:
    """What examples say, whatever their ids; without those of a kind that cannot be told so."""
    found = set()
    for each in examples:
        with suppress(TypeError):  # no dataclass, or one that holds lists
            found.add(replace(each, id=""))
    return found


def _cells_in_all(spec: CompareSpec) -> int:
    """How many `_cells` gives when none fails and no point of the grid changes the gates."""
    trials = len(spec.points) * spec.trials if spec.grid else 0
    arms = [changed(spec.base, arm) for arm in spec.arms.values()]
    controlled = sum(_is_controlled(spec, arm) for arm in arms)
    return len(arms) * trials + (len(arms) + CONTROLS * controlled) * len(spec.seeds)


def _is_controlled(spec: CompareSpec, arm: CellSpec) -> bool:
    """Several gates at once have no rate of one to match."""
    return spec.controls and len(_gates(arm)) == 1


def _gates(spec: CellSpec) -> list[Choice]:
    """Those of its method; none of a job that has no method."""
    found: list[Choice] = getattr(getattr(spec, "method", None), "gates", [])
    return found


def _cells(spec: CompareSpec, run: Run, registry: Registry) -> Iterator[Cell]:
    """All trials, then each arm at its best point and its controls, whose rates its cells give.

    The trials come first since the others answer held-out prompts of their own, in the same file.
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
    """An arm at every point of the grid; none without a grid."""
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
    """Raises UserError, after the first cell and not the last, when it cannot be chosen by."""
    known = [each.name for each in _metrics_of([cell.results()])]
    if known and spec.choose_by and spec.choose_by not in known:
        raise UserError(
            f"choose_by: no '{spec.choose_by}' was measured", nearest(spec.choose_by, known)
        )


def _best(spec: CompareSpec, trials: Sequence[Cell]) -> int | None:
    """The point that is best in the mean of its trials, of equals the first; None when none is.

    Without a grid there is one point, which is the best of all.
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
    """Of each point, in the mean over its trials; {} where one of them failed."""
    found = [
        [cell.results().after for cell in trials if cell.point == point]
        for point in range(len(spec.points))
    ]
    return [_means(each) if all(each) else {} for each in found]


def _deciding(spec: CompareSpec, results: Sequence[TrainingResults]) -> Metric | None:
    """The metric that a grid's point is chosen by; None where nothing was measured."""
    metrics = _metrics_of(results)
    return next((each for each in metrics if spec.choose_by in (None, each.name)), None)


def _metrics_of(results: Sequence[TrainingResults]) -> list[Metric]:
    """How the figures of some cells are shown: each once, those of the first cell first."""
    metrics = {each.name: each for one in results for each in one.metrics}
    return list(metrics.values())


def _control_gates(cell: Cell, registry: Registry) -> dict[str, dict[str, Any]]:
    """What an arm's gate has to beat: chance, a smaller loss everywhere, and its opposite."""
    lines = logged(cell.spec.run)
    (gate,) = _gates(cell.spec)
    rates = [line[f"acceptance/{gate.name}"] for line in lines if f"acceptance/{gate.name}" in line]
    if not rates:
        return {}  # the cell itself failed
    rate = min(max(float(np.mean(rates)), 0.0), 1.0)
    floor = float(getattr(Assembly(registry).build(gate), "floor", 0.0))
    return {
        "random": {"name": "random", "rate": rate, "floor": floor},
        "uniform": {"name": "uniform", "weight": rate + (1 - rate) * floor},
        "inverted": {"name": "inverted", "gate": gate.dump()},
    }


def _outcome(spec: CompareSpec, cells: Sequence[Cell], failures: Mapping[str, str]) -> Comparison:
    """Each arm's figures and cost, meaned over seeds; its differences from baseline and controls.

    Raises UserError when there is nothing to differ from.
    """
    baseline = spec.baseline or next(iter(spec.arms))
    done = [cell for cell in cells if cell.done and not cell.trial]
    measured: dict[str, dict[int, Measured]] = {}
    for cell in done:
        measured.setdefault(cell.arm, {})[cell.seed] = _measured(cell)
    theirs = measured.get(baseline)
    if theirs is None:
        raise UserError(
            f"no cell of the baseline '{baseline}' is done: {'; '.join(failures.values())}",
            "fix that, then rerun with resume=True",
        )
    done.sort(key=lambda cell: cell.arm != baseline)  # its figures are shown first
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
                figures=_means([each.means() for each in ours.values()]),
                cost=_mean_cost(own),
                controls={  # a gate is judged by what it has over its own
                    name.removeprefix(f"{arm}+"): _differences(ours, measured[name], spec.draws)
                    for name in controls
                    if name.startswith(f"{arm}+") and name in measured
                },
            )
            try:
                row = replace(row, differences=_differences(ours, theirs, spec.draws))
            except ValueError:
                told[arm] = f"measured on other rows than '{baseline}', and not to be compared"
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
    """With the points that it was tried at, their figures, and the point that was chosen."""
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
    """Of the seeds that both have. Raises ValueError when they are of other rows."""
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return {}
    return paired_differences([ours[s] for s in shared], [theirs[s] for s in shared], draws)


def _measured(cell: Cell) -> Measured:
    """The rows of a cell that is done.

    Raises:
        UserError: Its folder lacks them.
    """
    rows = cell.run.read(HELDOUT_ROWS)
    if rows is None or rows.after is None:
        raise UserError(
            f"{cell.run.path(HELDOUT_ROWS.name)} has no held-out rows of {cell.name}",
            f"remove {cell.run.folder}, and go on with resume=True",
        )
    return rows.after


def _mean_cost(cells: Sequence[Cell]) -> Cost:
    """Of cells that are done; what is not known of one of them is not known of their mean."""
    costs = [cell.run.read(CELL_COST) or Cost() for cell in cells]
    known = [{n: v for n, v in asdict(cost).items() if v is not None} for cost in costs]
    return Cost(**_means(known))


def _means(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = (name for name in dicts[0] if all(name in each for each in dicts))
    return {name: float(np.mean([each[name] for each in dicts])) for name in shared}
