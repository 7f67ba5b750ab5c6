"""The JSON files of a run folder: one record for each, for who writes it and who reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Begun:
    """before.json."""

    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """results.json, or what there is of it: figures before and after, and sample answers."""

    before: dict[str, float]
    after: dict[str, float] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Speedup:
    """Over another method: of each task set, and their mean with its interval if there is one."""

    sets: dict[str, float]
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BenchRow:
    """A method at a temperature and a batch size. draft_ms, verify_ms: milliseconds of a round.

    predicted: the speed-up over the plain loop that follows from tau and these.
    """

    method: str
    temperature: float
    batch_size: int
    tokens_per_second: float
    speedup: dict[str, Speedup]
    identical: float | None
    tau: float | None
    acceptance: list[float]
    predicted: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None


@dataclass(frozen=True)
class Bench:
    """bench.json."""

    target: str
    rows: list[BenchRow]


@dataclass(frozen=True)
class Point:
    """A point of a grid: dotted path of a field -> its value there."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison; without figures when none of its cells is done.

    grid: the points that it was tried at, if it was. chosen: of the best one, None if all failed.
    controls: of a gated arm: control -> by figure, the arm minus that control.
    """

    arm: str
    seeds: list[int]
    figures: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    grid: list[Point] = field(default_factory=list)
    chosen: dict[str, Any] | None = None
    controls: dict[str, dict[str, Difference]] = field(default_factory=dict)


@dataclass(frozen=True)
class ChosenBy:
    """By which figure, of which rows and seeds, the arms of a comparison chose their points."""

    metric: Metric
    rows: dict[str, Any]
    seeds: list[int]


@dataclass(frozen=True)
class Comparison:
    """comparison.json. failures: cell or arm -> the reason."""

    baseline: str
    seeds: list[int]
    metrics: list[Metric]
    arms: list[Arm]
    failures: dict[str, str]
    kept_by_these_rows: list[str] = field(default_factory=list)
    chosen_by: ChosenBy | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown. ``format`` is a format spec; ``better`` says which way is up."""

    name: str
    title: str
    format: str
    better: Literal["lower", "higher"]


METRICS = (
    Metric("teacher_kl", "teacher KL (nats/token)", ".3f", "lower"),
    Metric("perplexity", "perplexity", ".2f", "lower"),
    Metric("agreement", "top-1 agreement", ".1%", "higher"),
    Metric("acceptance", "acceptance rate", ".1%", "higher"),
    Metric("accuracy", "accuracy against the labels", ".1%", "higher"),
    Metric("rouge_l", "ROUGE-L of the answers", ".3f", "higher"),
    Metric("exact_match", "exact match of the answers", ".1%", "higher"),
)


def shown(figures: Mapping[str, float]) -> list[dict[str, str]]:
    """The metrics that are among some figures, as plain data, in the order of `METRICS`."""
    return [asdict(metric) for metric in METRICS if metric.name in figures]


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of R held-out rows, and of the answers to R' prompts.

    lengths: learned positions of each row. sums: figure -> its sum over each row's positions.
    scores: figure -> its value for each answer. ratios: figure -> for each row, what is divided,
    and by what.
    Kept by row, so that two models can be compared row by row.
    """

    lengths: list[int]
    sums: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def columns(self) -> dict[str, tuple[Sequence[float], Sequence[int]]]:
        """Figure -> its sum for each row (or answer), and what that is divided by."""
        return {
            **{name: (values, self.lengths) for name, values in self.sums.items()},
            **{name: (each, [1] * len(each)) for name, each in self.scores.items()},
            **self.ratios,
        }

    def means(self) -> dict[str, float]:
        """Means over all positions of all rows, or over the answers; ratios of sums over rows.

        perplexity is exp of the mean cross-entropy.
        """
        means = {
            name: sum(values) / max(sum(counts), 1)
            for name, (values, counts) in self.columns().items()
        }
        if "cross_entropy" in means:
            means["perplexity"] = math.exp(min(means.pop("cross_entropy"), 700.0))
        return means


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, with the borders of its interval of coverage `LEVEL`."""

    mean: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


GATES_FILE = "token_gates.json"


Choices = list[tuple[str, float]]
"""A model's likeliest tokens with their probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class JudgedToken:
    """A learned token.

    weights: of each gate, in [0, 1]; weight: their product. accepted: how far all gates together
    accept it, in [0, 1]: 0 where one of them gives a refused token's weight, which may not be 0.
    """

    text: str
    accepted: float
    weight: float
    weights: dict[str, float]
    student: Choices
    teacher: Choices


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """The learned tokens of a row. prompt: what comes before the first of them."""

    id: str
    prompt: str
    tokens: list[JudgedToken]


REPLAY_FILE = "replay.json"


@dataclass(frozen=True, slots=True)
class Node:
    """A proposed token. parent: its place among the round's nodes, -1 for the root."""

    text: str
    parent: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One verification: the tree, and the tokens that came of it, the target's own last.

    Raises ValueError for a node that stands before its parent.
    """

    nodes: list[Node]
    emitted: list[str]

    def __post_init__(self) -> None:
        if not all(-1 <= node.parent < place for place, node in enumerate(self.nodes)):
            raise ValueError("a node stands before its parent")


@dataclass(frozen=True, slots=True)
class Replay:
    """A decode of one prompt. method: its name among those that were replayed."""

    method: str
    prompt: str
    rounds: list[Round]

    @property
    def tau(self) -> float:
        """Tokens for each verification."""
        return sum(len(each.emitted) for each in self.rounds) / max(1, len(self.rounds))
