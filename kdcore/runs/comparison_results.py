"""The records of comparison.json and bench.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from kdcore.components.registry import installed
from kdcore.errors import UserError, nearest
from kdcore.runs.record_files import LEFT_OUT, RecordFile
from kdcore.runs.results import METRICS, Cost, Difference, Metric


@dataclass(frozen=True)
class GridPoint:
    """A point of a grid.

    Attributes:
        fields: Dotted path of a field -> its value at this point.
        figures: Figure -> its mean over the trials; empty if a trial failed.
    """

    fields: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison; without figures if no cell of it succeeded.

    Attributes:
        arm: The arm's name.
        seeds: The seeds of the arm's cells that succeeded.
        figures: Figure -> its mean over the seeds.
        cost: The mean cost of a cell over the seeds.
        differences: Figure -> the arm minus the baseline.
        controls: Control of a gated arm -> figure -> the arm minus that control.
        grid: The arm's grid points; empty without a grid.
        lacks: The fields of the grid that its spec lacks, over which it is not tried.
        chosen: The fields of the best point; None without a grid, or if every point failed.
    """

    arm: str
    seeds: list[int]
    figures: Annotated[dict[str, float], LEFT_OUT] = field(default_factory=dict)
    cost: Annotated[Cost | None, LEFT_OUT] = None
    differences: Annotated[dict[str, Difference], LEFT_OUT] = field(default_factory=dict)
    controls: dict[str, dict[str, Difference]] = field(default_factory=dict)
    grid: Annotated[list[GridPoint], LEFT_OUT] = field(default_factory=list)
    lacks: Annotated[list[str], LEFT_OUT] = field(default_factory=list)
    chosen: dict[str, Any] | None = None


@dataclass(frozen=True)
class ChosenBy:
    """The criterion by which the arms of a comparison chose their grid points.

    Attributes:
        metric: The metric.
        rows: The source of the validation rows.
        seeds: The seeds of the trials.
    """

    metric: Metric
    rows: dict[str, Any]
    seeds: list[int]


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, as comparison.json holds them.

    Attributes:
        baseline: The arm that the others are compared with.
        seeds: The seeds of the spec.
        metrics: Title and format of the figures.
        arms: The arms and the controls, in display order.
        failures: Cell or arm -> the reason of its failure, and on further lines its cure.
        kept_by_these_rows: The arms whose models were chosen on the reported rows.
        chosen_by: The criterion that chose the grid points, or None without a grid.
    """

    baseline: str
    seeds: list[int]
    metrics: list[Metric]
    arms: list[Arm]
    failures: dict[str, str]
    kept_by_these_rows: list[str] = field(default_factory=list)
    chosen_by: Annotated[ChosenBy | None, LEFT_OUT] = None


COMPARISON = RecordFile("comparison.json", Comparison, indent=2)


@dataclass(frozen=True)
class Speedup:
    """The speed-up of a method over another one.

    Attributes:
        sets: Task set -> median speed-up over its batches.
        mean: Mean over the sets.
        low: Lower bound of the mean's interval, or None.
        high: Upper bound of the mean's interval, or None.
    """

    sets: dict[str, float]
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TurnSpeed:
    """The speed of a method on one turn of the rows, e.g. the second of MT-Bench.

    Attributes:
        turn: The turn, from 1.
        tokens_per_second: Median over the batches of the turn.
        tau: Tokens per verification; None for a method of transformers.
        speedup: Other method -> the speed-up over it.
    """

    turn: int
    tokens_per_second: float
    tau: float | None
    speedup: dict[str, Speedup]


@dataclass(frozen=True)
class BenchRow:
    """The speed of a method with one number of threads, temperature and batch size.

    Attributes:
        method: The method's name.
        temperature: Sampling temperature; 0 is greedy.
        batch_size: Prompts per batch.
        tokens_per_second: Median over the batches.
        speedup: Other method -> the speed-up over it.
        identical: Share of greedy answers that equal the plain loop's, token by token.
        tau: Tokens per verification; None for a method of transformers.
        acceptance: Acceptance rate of each level, where it was reached.
        draft_ms: Milliseconds of drafting per round.
        verify_ms: Milliseconds of verification per round.
        predicted: Speed-up over the plain loop that ``tau`` and the two times predict.
        threads: Number of threads of a CPU.
        agreed: Mean share of the tokens of the plain loop's answer before the first that differs.
        cpu_ms: Milliseconds of CPU time for a token, median over the batches; None for a server.
        cpu_speedup: Other method -> the speed-up over it in tokens per second of CPU time.
        turns: The figures of each turn, where rows have several.
        undrafted: Share of the rounds without drafts; None for a method that does not count rounds.
    """

    method: str
    temperature: float
    batch_size: int
    tokens_per_second: float
    speedup: dict[str, Speedup]
    identical: float | None
    tau: float | None
    acceptance: list[float]
    draft_ms: float | None = None
    verify_ms: float | None = None
    predicted: float | None = None
    threads: int | None = None
    agreed: float | None = None
    cpu_ms: float | None = None
    cpu_speedup: dict[str, Speedup] = field(default_factory=dict)
    turns: list[TurnSpeed] = field(default_factory=list)
    undrafted: float | None = None

    @property
    def setting(self) -> str:
        """The setting, as a heading names it."""
        threads = "" if self.threads is None else f", threads {self.threads}"
        return f"temperature {self.temperature:g}, batch size {self.batch_size}{threads}"


@dataclass(frozen=True, kw_only=True)
class BenchResults:
    """The results of a benchmark, as bench.json holds them.

    Attributes:
        target: The target's name.
        sets: The task sets.
        processor: Name of the processor.
        multiplies: Its instructions for products of small numbers, e.g. avx512_bf16.
        rows: One row for each method and setting.
    """

    target: str
    sets: list[str] = field(default_factory=list)
    processor: str = ""
    multiplies: list[str] = field(default_factory=list)
    rows: list[BenchRow]


BENCH_RESULTS = RecordFile("bench.json", BenchResults, indent=2)


_MEASURED = {
    "distill": [metric.name for metric in METRICS],
    "train-drafter": ["tau", "tau_tree", "level_1"],
}
"""Metrics that a comparison of a job can have, beside the scores of answers; those of other jobs
are not known beforehand."""


def refuse_unmeasured(field: str, metric: str | None, job: str) -> None:
    """Check the name of a metric before a comparison trains anything.

    Args:
        field: Field or option that names the metric.
        metric: The name, or None.
        job: Job of the comparison's cells.

    Raises:
        UserError: No run of that job measures such a metric.
    """
    known = _MEASURED.get(job)
    if known is not None and job == "distill":
        known = [*known, *installed().names("score")]
    if metric is None or known is None or re.sub(r"^level_\d+$", "level_1", metric) in known:
        return
    raise UserError(f"{field}: unknown metric '{metric}'", nearest(metric, known), field)
