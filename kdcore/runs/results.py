"""What a run measures, as JSON files of its folder: the records for writer and reader alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, WrapSerializer

from kdcore.runs.record_files import LEFT_OUT, RecordFile


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


def shown(figures: Mapping[str, float]) -> list[Metric]:
    """The metrics that are among some figures, in the order of `METRICS`."""
    return [metric for metric in METRICS if metric.name in figures]


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


def _rows_or_none(rows: Any) -> Any:
    return None if rows == {} else rows


def _rows_or_empty(rows: Measured | None, dump: SerializerFunctionWrapHandler) -> Any:
    return {} if rows is None else dump(rows)


Rows = Annotated[Measured | None, BeforeValidator(_rows_or_none), WrapSerializer(_rows_or_empty)]
"""Figures by row; None where nothing was measured, for which a file has ``{}``."""


@dataclass(frozen=True)
class HeldOutResults:
    """before.json: a student or drafter measured once; the file has it as it was untrained.

    Attributes:
        figures: Figure -> its mean over the held-out rows; empty if nothing was measured.
        rows: The same figures by held-out row.
        answers: A student's sample answers, one for each prompt.
    """

    figures: dict[str, float] = field(default_factory=dict)
    rows: Rows = None
    answers: list[str] = field(default_factory=list)


FIRST_MEASUREMENT = RecordFile("before.json", HeldOutResults)


@dataclass(frozen=True)
class HeldOutRows:
    """heldout_rows.json: the figures by held-out row, so that runs can be compared.

    Attributes:
        before: Those before the training, if they were measured.
        after: Those of the student or drafter that the run keeps.
    """

    before: Rows = None
    after: Rows = None


HELDOUT_ROWS = RecordFile("heldout_rows.json", HeldOutRows)


@dataclass(frozen=True)
class TrainingResults:
    """results.json: what a training came to.

    Attributes:
        before: Figure -> its mean over the held-out rows before the training, if measured.
        after: The same of the student or drafter that the run keeps.
        metrics: How those figures are shown that have a title.
        samples: One for each prompt: ``prompt``, and who answered -> the answer.
        kept_by: What a drafter is the best of its checkpoints by; None if it is the last.
        kept_by_these_rows: Whether that was measured on the rows of ``after``, which flatters it;
            None for a student.
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
    """A mean difference, with the borders of its interval of coverage `LEVEL`."""

    mean: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


Choices = list[tuple[str, float]]
"""A model's likeliest tokens with their probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class GatedToken:
    """A learned token and what the gates give it.

    Attributes:
        text: The token as text.
        accepted: How far all gates together accept it, in [0, 1]; 0 where one of them gives a
            refused token's weight, which may not be 0.
        weight: The product of ``weights``.
        weights: Gate -> its weight, in [0, 1].
        student: The student's likeliest tokens there.
        teacher: The teacher's.
    """

    text: str
    accepted: float
    weight: float
    weights: dict[str, float]
    student: Choices
    teacher: Choices


@dataclass(frozen=True, slots=True)
class GatedResponse:
    """The learned tokens of a held-out row; token_gates.json has those of a few rows.

    Attributes:
        id: The row's.
        prompt: What comes before the first of the tokens.
        tokens: The learned tokens, in order.
    """

    id: str
    prompt: str
    tokens: list[GatedToken]


TOKEN_GATES = RecordFile("token_gates.json", list[GatedResponse])


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
    """A decode of one prompt; replay.json has one for each method that drafts.

    Attributes:
        method: Its name among those that were replayed.
        prompt: The prompt as text.
        rounds: The verifications, in order.
    """

    method: str
    prompt: str
    rounds: list[Round]

    @property
    def tau(self) -> float:
        """Tokens for each verification."""
        return sum(len(each.emitted) for each in self.rounds) / max(1, len(self.rounds))


REPLAYS = RecordFile("replay.json", list[Replay])


@dataclass(frozen=True)
class Cost:
    """cost.json: what a comparison's cell took; what is not known is None.

    Attributes:
        seconds: Seconds inside steps.
        tokens: Tokens that each model read.
        peak_memory: Bytes of the cell's process, at their highest.
    """

    seconds: Annotated[float | None, LEFT_OUT] = None
    tokens: Annotated[float | None, LEFT_OUT] = None
    peak_memory: Annotated[float | None, LEFT_OUT] = None


CELL_COST = RecordFile("cost.json", Cost)
