"""The cells of a comparison: one arm with one seed each, in the order in which they run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.models.assembly import Assembly
from kdcore.runs.folder import CELLS, Run
from kdcore.runs.results import CELL_COST, TRAINING_RESULTS, Metric, TrainingResults, means_over
from kdcore.specs.compare import CellSpec, CompareSpec, changed, nested, plain
from kdcore.specs.parts.training import KeptResponsesSpec

CONTROLS = 3
"""Number of control arms of an arm with one gate; see `_control_gates`."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm with one seed, at one point of the grid.

    Attributes:
        arm: The arm's name, or ``ARM+CONTROL``.
        seed: The seed of the run.
        point: Index of the grid point.
        spec: The spec of the run.
        trial: Whether the run only serves to choose the grid point.
    """

    arm: str
    seed: int
    point: int
    spec: CellSpec
    trial: bool = False

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return f"{self.arm}, {f'point {self.point}, ' if self.trial else ''}seed {self.seed}"

    @property
    def run(self) -> Run:
        """The cell's run."""
        return Run(self.spec.run)

    @property
    def done(self) -> bool:
        """Whether the run is finished and its cost is written."""
        return is_done(self.run) and self.run.path(CELL_COST.name).exists()

    def results(self) -> TrainingResults:
        """The cell's ``results.json``, or empty results if the cell is not done."""
        return (self.run.read(TRAINING_RESULTS) if self.done else None) or TrainingResults()


def is_done(run: Run) -> bool:
    """Whether a run of any job, with a model card or without one, has come to its end."""
    return run.finished or run.status == "done"


def logged(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cells_in_all(spec: CompareSpec) -> int:
    """The number of cells if none fails and no grid point changes the gates."""
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


def independent_cells(spec: CompareSpec, run: Run, registry: Registry) -> Iterator[list[Cell]]:
    """Yield lists of cells that depend only on those of earlier lists.

    These are all trials, then each arm at its best point, then the controls, which need its rates.
    The trials come first because the other cells add responses for their own held-out prompts to
    the shared file of responses.

    Args:
        spec: The compare spec.
        run: The comparison's run.
        registry: The installed components.
    """
    trials = {arm: _trials(spec, run, arm) for arm in spec.arms}
    yield from _after_their_files([cell for each in trials.values() for cell in each])
    points = {arm: best_point(spec, trials[arm]) for arm in spec.arms}
    reported = {
        arm: [_cell(spec, run, arm, point, seed) for seed in spec.seeds]
        for arm, point in points.items()
        if point is not None
    }
    yield from _after_their_files([cell for each in reported.values() for cell in each])
    yield [
        control
        for own in reported.values()
        if _is_controlled(spec, own[0].spec)
        for cell in own
        for control in _controls(spec, run, cell, registry)
    ]


def _after_their_files(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yield cells, after the first one with the same data if it makes files for the others.

    Generated responses and hidden states depend on the batches that they are computed in.
    """
    firsts: dict[str, Cell] = {}
    for cell in cells:
        if _makes_shared_files(cell.spec.data):
            firsts.setdefault(json.dumps(plain(cell.spec)["data"]), cell)
    yield from ([cell] for cell in firsts.values())
    yield [cell for cell in cells if cell not in firsts.values()]


def _makes_shared_files(data: Any) -> bool:
    """Whether a cell with such data generates responses, or hidden states that others read."""
    by = getattr(getattr(data, "responses", None), "by", "dataset")
    states = getattr(data, "hidden_states", None)
    return by != "dataset" or (states is not None and states.folder is not None)


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


def best_point(spec: CompareSpec, trials: Sequence[Cell]) -> int | None:
    """The first grid point with the best mean over its trials; None when every point failed.

    Without a grid there is only point 0.
    """
    if not trials:
        return 0
    metric = deciding_metric(spec, [cell.results() for cell in trials])
    if metric is None:
        return None
    means = [figures.get(metric.name, math.nan) for figures in trial_figures(spec, trials)]
    finite = {point: mean for point, mean in enumerate(means) if math.isfinite(mean)}
    if not finite:
        return None
    return (min if metric.better == "lower" else max)(finite, key=finite.__getitem__)


def trial_figures(spec: CompareSpec, trials: Sequence[Cell]) -> list[dict[str, float]]:
    """The mean figures of each grid point over its trials; {} where a trial failed."""
    found = [
        [cell.results().after for cell in trials if cell.point == point]
        for point in range(len(spec.points))
    ]
    return [means_over(each) if all(each) else {} for each in found]


def deciding_metric(spec: CompareSpec, results: Sequence[TrainingResults]) -> Metric | None:
    """The metric that chooses the grid point; None where nothing was measured."""
    metrics = metrics_of(results)
    return next((each for each in metrics if spec.choose_by in (None, each.name)), None)


def metrics_of(results: Sequence[TrainingResults]) -> list[Metric]:
    """The metrics of all cells, each once, in the order of the first cell that has it."""
    metrics = {each.name: each for one in results for each in one.metrics}
    return list(metrics.values())


def _controls(spec: CompareSpec, run: Run, cell: Cell, registry: Registry) -> Iterator[Cell]:
    for control, gate in _control_gates(cell, registry).items():
        arm = f"{cell.arm}+{control}"
        place = str(_folder(spec, run, arm, cell.point, cell.seed))
        changes = {"method": {"gates": [gate]}, "run": place}
        yield Cell(arm, cell.seed, cell.point, changed(cell.spec, changes))


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
