"""The records of a run's measurements, and the JSON files of the run folder that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, WrapSerializer

from kdcore.runs.record_files import LEFT_OUT, RecordFile


@dataclass(frozen=True, slots=True)
class Metric:
    """The display of a metric.

    Attributes:
        name: The figure's name in the files.
        title: The title in tables and plots.
        format: The format spec of a value.
        better: Whether lower or higher values are better.
    """

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
    Metric("top_5", "top-5 accuracy", ".1%", "higher"),
    Metric("f1", "F1 of the labels", ".1%", "higher"),
)


OF_TEACHER = ("teacher_kl", "agreement", "acceptance")
"""Metrics that need a live teacher."""


def shown(figures: Mapping[str, float]) -> list[Metric]:
    """Select the metrics of the given figures, in the order of `METRICS`."""
    return [metric for metric in METRICS if metric.name in figures]


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures by held-out row, so that two models can be compared row by row.

    Attributes:
        lengths: Number of learned positions of each row.
        sums: Figure -> its sum over the positions of each row.
        scores: Figure -> its value for each answer.
        ratios: Figure -> numerators and denominators of the rows.
    """

    lengths: list[int]
    sums: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def columns(self) -> dict[str, tuple[Sequence[float], Sequence[int]]]:
        """Return figure -> its sum for each row (or answer), and the divisors."""
        return {
            **{name: (values, self.lengths) for name, values in self.sums.items()},
            **{name: (each, [1] * len(each)) for name, each in self.scores.items()},
            **self.ratios,
        }

    def means(self) -> dict[str, float]:
        """Return the means over all positions of all rows, or over the answers.

        A ratio is the sum of its numerators divided by the sum of its denominators; perplexity is
        exp of the mean cross-entropy.
        """
        means = {
            name: sum(values) / max(sum(counts), 1)
            for name, (values, counts) in self.columns().items()
        }
        if "cross_entropy" in means:
            means["perplexity"] = math.exp(min(means.pop("cross_entropy"), 700.0))
        return means


def means_over(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure that all results contain.

    Args:
        results: Figure -> value, e.g. of each seed; at least one.

    Returns:
        Figure -> mean, in the order of the first result.
    """
    shared = [name for name in results[0] if all(name in each for each in results)]
    return {name: fmean(each[name] for each in results) for name in shared}


def _rows_or_none(rows: Any) -> Any:
    return None if rows == {} else rows


def _rows_or_empty(rows: Measured | None, dump: SerializerFunctionWrapHandler) -> Any:
    return {} if rows is None else dump(rows)


Rows = Annotated[Measured | None, BeforeValidator(_rows_or_none), WrapSerializer(_rows_or_empty)]
"""Figures by row; None without a measurement, which a file writes as ``{}``."""


@dataclass(frozen=True)
class HeldOutResults:
    """One measurement of a student or drafter; before.json holds the one before the training.

    Attributes:
        figures: Figure -> its mean over the held-out rows; empty without a measurement.
        rows: The same figures by held-out row.
        answers: A student's sample answers, one for each prompt.
    """

    figures: dict[str, float] = field(default_factory=dict)
    rows: Rows = None
    answers: list[str] = field(default_factory=list)


FIRST_MEASUREMENT = RecordFile("before.json", HeldOutResults)


@dataclass(frozen=True)
class HeldOutRows:
    """The figures by held-out row, as heldout_rows.json holds them, so that runs can be compared.

    Attributes:
        before: The figures before the training, if measured.
        after: The figures of the final student or drafter.
    """

    before: Rows = None
    after: Rows = None


HELDOUT_ROWS = RecordFile("heldout_rows.json", HeldOutRows)


@dataclass(frozen=True)
class TrainingResults:
    """The results of a training, as results.json holds them.

    Attributes:
        before: Figure -> its mean over the held-out rows before the training, if measured.
        after: Figure -> its mean for the final student or drafter.
        metrics: Title and format of the figures that have them.
        samples: For each prompt: ``prompt``, and answering model -> answer.
        kept_by: The criterion that chose the best checkpoint; None for the last state.
        kept_by_these_rows: Whether the rows of ``after`` chose it, which makes the figures
            optimistic; None for a student of the last step.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    kept_by: Annotated[str | None, LEFT_OUT] = None
    kept_by_these_rows: Annotated[bool | None, LEFT_OUT] = None


TRAINING_RESULTS = RecordFile("results.json", TrainingResults, indent=2, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with the bounds of its interval, of coverage `LEVEL`."""

    mean: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


Choices = list[tuple[str, float]]
"""A model's likeliest tokens with their probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class GatedToken:
    """A learned token with its gate weights.

    Attributes:
        text: The token as text.
        accepted: Acceptance by all gates together, in [0, 1]; 0 if a gate refuses the token, even
            if the gate's floor is above 0.
        weight: The product of ``weights``.
        weights: Gate -> its weight, in [0, 1].
        student: The student's likeliest tokens at this position.
        teacher: The teacher's likeliest tokens at this position.
    """

    text: str
    accepted: float
    weight: float
    weights: dict[str, float]
    student: Choices
    teacher: Choices


@dataclass(frozen=True, slots=True)
class GatedResponse:
    """The learned tokens of a held-out row; token_gates.json holds those of a few rows.

    Attributes:
        id: The row's id.
        prompt: The text before the first token.
        tokens: The learned tokens, in order.
    """

    id: str
    prompt: str
    tokens: list[GatedToken]


TOKEN_GATES = RecordFile("token_gates.json", list[GatedResponse])


@dataclass(frozen=True, slots=True)
class Node:
    """A proposed token; ``parent``: the index of its parent in the round, or -1 for the root."""

    text: str
    parent: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One verification: the draft tree and the emitted tokens, the target's own token last.

    Raises:
        ValueError: A node comes before its parent.
    """

    nodes: list[Node]
    emitted: list[str]

    def __post_init__(self) -> None:
        if not all(-1 <= node.parent < place for place, node in enumerate(self.nodes)):
            raise ValueError("a node comes before its parent")


@dataclass(frozen=True, slots=True)
class Replay:
    """A decode of one prompt; replay.json holds one for each drafting method.

    Attributes:
        method: The method's name.
        prompt: The prompt as text.
        rounds: The verifications, in order.
    """

    method: str
    prompt: str
    rounds: list[Round]

    @property
    def tau(self) -> float:
        """Tokens per verification."""
        return sum(len(each.emitted) for each in self.rounds) / max(1, len(self.rounds))


REPLAYS = RecordFile("replay.json", list[Replay])


@dataclass(frozen=True)
class Cost:
    """The cost of a comparison's cell, as cost.json holds it; an unknown value is None.

    Attributes:
        seconds: Seconds inside steps.
        tokens: Tokens that each model read.
        peak_memory: Peak memory of the cell's process in bytes.
    """

    seconds: Annotated[float | None, LEFT_OUT] = None
    tokens: Annotated[float | None, LEFT_OUT] = None
    peak_memory: Annotated[float | None, LEFT_OUT] = None


CELL_COST = RecordFile("cost.json", Cost)


@dataclass(frozen=True)
class CellFailure:
    """The failure of a comparison's cell.

    Attributes:
        cause: What is wrong, a line for each mistake.
        cure: What to type or change, a line for each; empty if an older version wrote the file.
    """

    cause: str
    cure: str = ""

    def __str__(self) -> str:
        """The lines as every message has them."""
        return "\n".join([self.cause, *(f"  fix: {line}" for line in self.cure.splitlines())])


CELL_FAILURE = RecordFile("failure.json", CellFailure)
