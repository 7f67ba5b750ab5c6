"""The cells of a comparison: one arm with one seed each, in the order in which they run."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.runs.folder import CELLS, Run
from kdcore.runs.results import (
    CELL_COST,
    CELL_FAILURE,
    TRAINING_RESULTS,
    CellFailure,
    Metric,
    TrainingResults,
    means_over,
)
from kdcore.runs.whole_files import write_text
from kdcore.specs.comparable import CellSpec
from kdcore.specs.compare import CompareSpec
from kdcore.specs.parts.changes import changed, plain
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
        number: Number of the cell among those that run together; a control has its arm's.
    """

    arm: str
    seed: int
    point: int
    spec: CellSpec
    trial: bool = False
    number: int = 0

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return f"{self.arm}, {f'point {self.point}, ' if self.trial else ''}seed {self.seed}"

    @property
    def run(self) -> Run:
        """The cell's run."""
        return Run(self.spec.run, planned=True)

    @property
    def done(self) -> bool:
        """Whether the run is finished and its cost is written."""
        return is_done(self.run) and self.run.path(CELL_COST.name).exists()

    @property
    def failure(self) -> CellFailure | None:
        """The reason for which the cell failed when it ran last; None if it did not fail."""
        path = _beside(self.spec.run, CELL_FAILURE.name)
        return CELL_FAILURE.read(path) if path.exists() and not self.done else None

    @property
    def ended(self) -> bool:
        """Whether the cell is done or has failed."""
        return self.done or self.failure is not None

    @property
    def busy(self) -> bool:
        """Whether a process runs the cell now."""
        lock = self.run.path("lock")
        if not lock.exists():
            return False
        try:
            with FileLock(lock, timeout=0):
                return False
        except Timeout:
            return True

    def refuse_other_spec(self, registry: Registry) -> None:
        """Check that a cell which is done was made by this comparison.

        Another machine may have run it. The folder of the responses does not matter, nor whether
        the cell was measured before its training, which no table shows.

        Args:
            registry: The installed components.

        Raises:
            UserError: It was made by another spec.
        """
        asked: Any = self.spec
        changed = self.run.changed_from(asked, registry) if self.done else []
        free = {"data.responses.folder", "evaluation.before"}
        if changed := [name for name in changed if name not in free]:
            raise UserError(
                f"{self.run.folder} was made with a different spec; changed: {', '.join(changed)}",
                "give all machines one spec, with models and data at the same paths; or remove "
                "that folder, then rerun the command, which repeats the cell",
            )

    def record_failure(self, failure: CellFailure, traceback: str) -> None:
        """Write the reason of a failure, which all shares then know, and its traceback if any."""
        file = _beside(self.spec.run, CELL_FAILURE.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if traceback:
            write_text(traceback_file(self.spec.run), traceback)
        write_text(file, CELL_FAILURE.text(failure))

    def forget_failure(self) -> None:
        """Remove the reason of a failure and its traceback, before the cell runs again."""
        for file in (_beside(self.spec.run, CELL_FAILURE.name), traceback_file(self.spec.run)):
            file.unlink(missing_ok=True)

    def results(self) -> TrainingResults:
        """The cell's ``results.json``, or empty results if the cell is not done."""
        return (self.run.read(TRAINING_RESULTS) if self.done else None) or TrainingResults()


def traceback_file(run: Path) -> Path:
    """The file with the traceback of a cell that failed.

    Args:
        run: The cell's run folder.
    """
    return _beside(run, "traceback.txt")


def _beside(run: Path, name: str) -> Path:
    return run.with_name(f"{run.name}.{name}")  # inside is no file before a run is opened there


def is_done(run: Run) -> bool:
    """Whether a run of any job, with a model card or without one, has come to its end."""
    return run.finished or run.status == "done"


def logged(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cells_by_arm(spec: CompareSpec) -> dict[str, int]:
    """The number of cells of each arm if none fails and no grid point changes the gates."""
    found = {}
    for name, arm in spec.arms.items():
        trials = len(spec.points_of(name)) * spec.trials if spec.grids[name] else 0
        controls = CONTROLS * _is_controlled(spec, changed(spec.base, arm))
        found[name] = trials + (1 + controls) * len(spec.seeds)
    return found


def untried(spec: CompareSpec) -> Iterator[str]:
    """Yield a line for each arm that is not tried over the whole grid, since it lacks a field."""
    for arm in spec.arms:
        if lacks := ", ".join(spec.lacks(arm)):
            only = "is tried over the other fields of the grid only"
            tried = only if spec.grids[arm] else "runs without trials"
            yield f"arm '{arm}' {tried}: its spec lacks {lacks}"


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
    the shared file of responses. Lists end early where cells of an earlier list have not ended
    when the next one is asked for: other processes run them.

    Args:
        spec: The compare spec.
        run: The comparison's run.
        registry: The installed components.
    """
    every = _numbered([cell for arm in spec.arms for cell in _trials(spec, run, arm)])
    if not (yield from _in_order(every)):
        return
    trials = {arm: [cell for cell in every if cell.arm == arm] for arm in spec.arms}
    points = {arm: best_point(spec, trials[arm]) for arm in spec.arms}
    reported = _numbered(
        [
            _cell(spec, run, arm, point, seed)
            for arm, point in points.items()
            if point is not None
            for seed in spec.seeds
        ]
    )
    yield from _in_order(reported)
    yield [
        control
        for cell in reported
        if _is_controlled(spec, cell.spec) and cell.ended
        for control in _controls(spec, run, cell, registry)
    ]


def _numbered(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, number=number) for number, cell in enumerate(cells)]


def _in_order(cells: list[Cell]) -> Generator[list[Cell], None, bool]:
    """Yield cells, after the first one with the same data if it makes files for the others.

    Generated responses and hidden states depend on the batches that they are computed in. Return
    whether all cells have ended.
    """
    firsts: dict[str, Cell] = {}
    for cell in cells:
        for data in shared_files(cell.spec).values():
            firsts.setdefault(data, cell)
    rest = [cell for cell in cells if cell not in firsts.values()]
    for part in (*([cell] for cell in firsts.values()), rest):
        yield part
        if not all(cell.ended for cell in part):
            return False
    return True


def shared_files(spec: CellSpec) -> dict[str, str]:
    """What a cell computes into a folder that other cells read.

    Args:
        spec: The spec of the cell.

    Returns:
        The purpose of the work, as in `kdcore.jobs.preflight.report.Report.seconds` -> the data
        that it depends on: cells with the same data share it.
    """
    data: Any = spec.data
    found: dict[str, Any] = {}
    responses: Any = getattr(data, "responses", None)
    if getattr(responses, "by", "dataset") != "dataset":
        prompts = {n: each.dump() for n, each in data.sources.items() if n != "auxiliary"}
        found["responses"] = [prompts, str(responses.folder)]
    states = getattr(data, "hidden_states", None)
    if states is not None and states.folder is not None:
        found["hidden states"] = plain(spec)["data"]
    return {purpose: json.dumps(decides) for purpose, decides in found.items()}


def _trials(spec: CompareSpec, run: Run, arm: str) -> list[Cell]:
    """The trial cells of an arm, one per grid point and trial seed; none if it has no choice."""
    if not spec.validation or not spec.grids[arm]:
        return []
    rows = {"heldout": spec.validation.dump()}
    return [
        _cell(spec, run, arm, place, seed, rows, trial=True)
        for place in range(len(spec.points_of(arm)))
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
    at_point = spec.at_point(arm, point)
    rows = dict(data or {})
    responses = getattr(at_point.data, "responses", None)
    if isinstance(responses, KeptResponsesSpec):
        rows["responses"] = {"folder": str(responses.folder or run.path("responses"))}
    own = {"run": str(_folder(spec, run, arm, point, seed)), "seed": seed, "data": rows}
    return Cell(arm, seed, point, changed(at_point, own), trial)


def _folder(spec: CompareSpec, run: Run, arm: str, point: int, seed: int) -> Path:
    at = [f"point-{point}"] if spec.grids[arm.partition("+")[0]] else []
    return run.path(CELLS, arm, *at, f"seed-{seed}")


def best_point(spec: CompareSpec, trials: Sequence[Cell]) -> int | None:
    """The first grid point with the best mean over its trials; None when every point failed.

    Without trials there is only point 0.
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
    """The mean figures of each grid point of an arm over its trials; {} where a trial failed."""
    found = [
        [cell.results().after for cell in trials if cell.point == point]
        for point in range(len(spec.points_of(trials[0].arm)))
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
        yield Cell(arm, cell.seed, cell.point, changed(cell.spec, changes), number=cell.number)


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
