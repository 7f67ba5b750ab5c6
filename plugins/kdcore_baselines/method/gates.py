"""Baseline gates: controls, thresholds and top fractions. Shapes: `kdcore.method.records`.

Every claim about a gate requires its controls: `Random` at the same acceptance rate, `uniform` at
the same mean weight, and `inverted`, which keeps the positions that the gate rejects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kdcore import Params, RankedGate, Stateful, by_keywords
from kdcore_baselines.method import params
from kdcore_baselines.method.stateless import stateless

if TYPE_CHECKING:
    from kdcore import BuildContext, Gate, LogitBatch

Formula = TypeVar("Formula", bound=Callable[..., Any])


def looks_at(teacher_classes: int) -> Callable[[Formula], Formula]:
    """Declare the number of top teacher classes that a gate reads.

    Args:
        teacher_classes: Number of the teacher's most likely classes.

    Returns:
        A decorator of the gate's formula.
    """

    def say(formula: Formula) -> Formula:
        vars(formula)["teacher_classes"] = teacher_classes
        return formula

    return say


def of_any_tokenizer(formula: Formula) -> Formula:
    """Declare that a gate works where the classes of teacher and student are other tokens."""
    vars(formula)["any_tokenizer"] = True
    return formula


@stateless(Params)
@looks_at(0)
def everything(batch: LogitBatch) -> Tensor:
    """Give every position weight 1: the neutral gate."""
    return torch.ones_like(batch.mask, dtype=batch.student.dtype)


@stateless(params.Uniform)
@looks_at(0)
def uniform(batch: LogitBatch, weight: float) -> Tensor:
    """Give every position the same weight."""
    return torch.full_like(batch.mask, weight, dtype=batch.student.dtype)


@stateless(params.Discount)
@looks_at(0)
def discount(batch: LogitBatch, gamma: float) -> Tensor:
    """Decrease the weight along a row: gamma^i at position i, as EAGLE-3 weights later tokens."""
    return (gamma**batch.position).to(batch.student.dtype)


class Random:
    """Gate with weight 1 with probability `rate`, else `floor`, drawn anew for each batch."""

    teacher_classes = 0

    @by_keywords(params.Random)
    def __init__(self, params: params.Random, context: BuildContext) -> None:
        self.rate = params.rate
        self.floor = params.floor

    def __call__(self, batch: LogitBatch) -> Tensor:
        uniform_BT = torch.rand(
            batch.mask.shape, generator=batch.generator, device=batch.mask.device
        )
        kept_BT = (uniform_BT < self.rate).to(batch.student.dtype)
        return kept_BT + (1 - kept_BT) * self.floor


class _Inverted:
    """Shared part of the inverted gates: inverts the weights and forwards the state."""

    def __init__(self, gate: Gate | RankedGate) -> None:
        self.gate = gate
        self.floor: float = getattr(gate, "floor", 0.0)
        self.teacher_classes: int | None = getattr(gate, "teacher_classes", None)
        self.any_tokenizer: bool = getattr(gate, "any_tokenizer", False)
        self.reference: str | None = getattr(gate, "reference", None)
        if isinstance(gate, Stateful):
            self.step_done = gate.step_done
            self.state_dict = gate.state_dict
            self.load_state_dict = gate.load_state_dict

    def turned(self, weights: Tensor) -> Tensor:
        """Swap the weights 1 and `floor`."""
        return 1 - (weights - self.floor)


class _InvertedGate(_Inverted):
    gate: Gate

    def __call__(self, batch: LogitBatch) -> Tensor:
        return self.turned(self.gate(batch))


class _InvertedRankedGate(_Inverted):
    gate: RankedGate

    def __init__(self, gate: RankedGate) -> None:
        super().__init__(gate)
        self.within_rows: bool = getattr(gate, "within_rows", False)
        if hasattr(gate, "temperatures"):
            self.temperatures = gate.temperatures
        if hasattr(gate, "remember"):
            self.remember = gate.remember

    def score(self, batch: LogitBatch) -> Tensor:
        return self.gate.score(batch)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return self.turned(self.gate.weigh(scores, progress))


@by_keywords(params.Inverted)
def inverted(params: params.Inverted, context: BuildContext) -> Gate | RankedGate:
    """Build the inverse of a gate, with the same floor; it is ranked if that gate is.

    Args:
        params: Parameters with the choice of the gate.
        context: Context that builds the gate.

    Returns:
        The inverted gate.
    """
    gate = context.build(params.gate)
    return _InvertedRankedGate(gate) if isinstance(gate, RankedGate) else _InvertedGate(gate)


def entropy_of(logits_BTV: Tensor) -> Tensor:
    """Compute the entropy H = -sum_v prob_v log prob_v in nats.

    Args:
        logits_BTV: [B, T, V] logits.

    Returns:
        The entropy [B, T].
    """
    logp_BTV = logits_BTV.log_softmax(-1)
    return -(logp_BTV.exp() * logp_BTV).sum(-1)


@stateless(params.Entropy)
@of_any_tokenizer
def entropy(batch: LogitBatch, threshold: float | None) -> Tensor:
    """Keep positions with teacher entropy H below the threshold; if None, weight 1 - H / log V."""
    entropy_BT = entropy_of(batch.teacher)
    if threshold is None:
        return (1 - entropy_BT / math.log(batch.teacher.shape[-1])).clamp(0, 1)
    return (entropy_BT < threshold).to(entropy_BT.dtype)


@stateless(params.Confidence)
@of_any_tokenizer
@looks_at(1)
def confidence(batch: LogitBatch, threshold: float) -> Tensor:
    """Keep the positions where the teacher's maximum probability is above the threshold."""
    largest_BT = (batch.teacher.amax(-1) - batch.teacher.logsumexp(-1)).exp()
    return (largest_BT > threshold).to(largest_BT.dtype)


def highest(scores: Tensor, count: int) -> Tensor:
    """Keep the highest scores, and all ties of the last one, so that their order has no effect.

    Args:
        scores: [N] scores; N may be 0.
        count: Number of scores to keep; at least one is kept.

    Returns:
        [N] weights 0 and 1.
    """
    if not len(scores):
        return scores
    return (scores >= scores.topk(max(1, count)).values[-1]).to(scores.dtype)


@dataclass(frozen=True)
class TopFraction:
    """Ranked gate that keeps the highest-scoring fraction of the masked positions, at least one.

    Attributes:
        score: Function from a batch to scores [B, T].
        fraction: Fraction of positions to keep.
        teacher_classes: Number of top teacher classes that the score reads; None for all.
        reference: Name of the reference model, or None.
    """

    score: Callable[[LogitBatch], Tensor]
    fraction: float
    teacher_classes: int | None = None
    reference: str | None = None

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return highest(scores, round(self.fraction * len(scores)))


@by_keywords(params.StudentEntropy)
def student_entropy(params: params.StudentEntropy, context: BuildContext) -> TopFraction:
    """Build the gate that keeps the highest student entropies of a micro-batch."""
    return TopFraction(lambda batch: entropy_of(batch.student), params.fraction, teacher_classes=0)


def hellinger_distance(batch: LogitBatch) -> Tensor:
    """Compute the Hellinger distance sqrt(1/2 sum_v (sqrt teacher_v - sqrt student_v)^2).

    Args:
        batch: Logits of student and teacher.

    Returns:
        The distance [B, T] in [0, 1].
    """
    gap_BTV = batch.teacher.softmax(-1).sqrt() - batch.student.softmax(-1).sqrt()
    distance_BT: Tensor = torch.linalg.vector_norm(gap_BTV, dim=-1) / math.sqrt(2)
    return distance_BT


@by_keywords(params.Hellinger)
def hellinger(params: params.Hellinger, context: BuildContext) -> TopFraction:
    """Build the gate that keeps the largest Hellinger distances of a micro-batch."""
    return TopFraction(hellinger_distance, params.fraction)


def left_to_gain(batch: LogitBatch) -> Tensor:
    """Compute KL(teacher || student) - KL(teacher || reference) in nats.

    The code uses sum_v teacher_v (log reference_v - log student_v): the teacher's entropy cancels.

    Args:
        batch: Logits of student, teacher and reference.

    Returns:
        The difference [B, T].
    """
    assert batch.reference is not None  # since the gate names a reference
    gap_BTV = batch.reference.log_softmax(-1) - batch.student.log_softmax(-1)
    return (batch.teacher.softmax(-1) * gap_BTV).sum(-1)


@by_keywords(params.AdaSPEC)
def adaspec(params: params.AdaSPEC, context: BuildContext) -> TopFraction:
    """Build the gate of AdaSPEC, which keeps the largest KL gaps to a reference (2510.19779)."""
    return TopFraction(left_to_gain, params.fraction, reference=params.reference)
