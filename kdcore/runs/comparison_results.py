"""How methods compare: the records of comparison.json and bench.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from kdcore.runs.record_files import LEFT_OUT, RecordFile
from kdcore.runs.results import Cost, Difference, Metric


@dataclass(frozen=True)
class GridPoint:
    """A point of a grid.

    Attributes:
        fields: Dotted path of a field -> its value there.
        figures: Figure -> its mean over the trials; empty where one of them failed.
    """

    fields: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison; without figures when none of its cells is done.

    Attributes:
        arm: Its name.
        seeds: The seeds of its cells that are done.
        figures: Figure -> its mean over the seeds.
        cost: What a cell took, in the mean over the seeds.
        differences: Figure -> the arm minus the baseline.
        controls: Control of a gated arm -> by figure, the arm minus that control.
        grid: The points that the arm was tried at, if it was.
        chosen: The fields of the best point; None without a grid, and if every point failed.
    """

    arm: str
    seeds: list[int]
    figures: Annotated[dict[str, float], LEFT_OUT] = field(default_factory=dict)
    cost: Annotated[Cost | None, LEFT_OUT] = None
    differences: Annotated[dict[str, Difference], LEFT_OUT] = field(default_factory=dict)
    controls: dict[str, dict[str, Difference]] = field(default_factory=dict)
    grid: Annotated[list[GridPoint], LEFT_OUT] = field(default_factory=list)
    chosen: dict[str, Any] | None = None


@dataclass(frozen=True)
class ChosenBy:
    """How the arms of a comparison chose their points.

    Attributes:
        metric: The figure.
        rows: The source of the rows that it was measured on.
        seeds: The seeds of the trials.
    """

    metric: Metric
    rows: dict[str, Any]
    seeds: list[int]


@dataclass(frozen=True)
class Comparison:
    """comparison.json.

    Attributes:
        baseline: The arm that the others differ from.
        seeds: All that were asked for.
        metrics: How the figures are shown.
        arms: The arms and the controls, in the order in which they are shown.
        failures: Cell or arm -> the reason.
        kept_by_these_rows: The arms whose drafters were chosen on the rows that are reported.
        chosen_by: How a grid's points were chosen.
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
    """How many times faster than another method.

    Attributes:
        sets: Task set -> the median over its batches.
        mean: The mean over the sets.
        low: The lower border of its interval, if there is one.
        high: The upper border.
    """

    sets: dict[str, float]
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BenchRow:
    """A method at a temperature and a batch size.

    Attributes:
        method: Its name.
        temperature: Of the sampling; 0 is greedy.
        batch_size: Prompts at once.
        tokens_per_second: The median over the batches.
        speedup: Other method -> the speed-up over it.
        identical: The share of greedy answers that are the plain loop's, token by token.
        tau: Tokens for each verification; None for a method of transformers.
        acceptance: For each level, how often it was accepted where it was reached.
        draft_ms: Milliseconds that a round drafts.
        verify_ms: Milliseconds that a round verifies.
        predicted: The speed-up over the plain loop that follows from ``tau`` and these.
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


@dataclass(frozen=True, kw_only=True)
class BenchResults:
    """bench.json.

    Attributes:
        target: The target's name.
        sets: The task sets.
        rows: A row for each method, temperature and batch size.
    """

    target: str
    sets: list[str] = field(default_factory=list)
    rows: list[BenchRow]


BENCH_RESULTS = RecordFile("bench.json", BenchResults, indent=2)
