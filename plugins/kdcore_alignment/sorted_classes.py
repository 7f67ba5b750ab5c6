"""ULD: compare the sorted probabilities of two models, whatever their classes are.

With p the teacher, q the student, and (i) the i-th largest of a position's probabilities,

    L = sum_i |p_(i) - q_(i)|,   zeros appended to the shorter of the two

which is twice the divergence ``total_variation`` of the sorted classes. Source: arXiv 2402.12030.
Where a span of text has several tokens (GOLD, of trl), p and q are multiplied by each model's
probability of the span's other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import BuildContext, LogitBatch, Part, by_keywords
from kdcore.method.records import LOG_ZERO
from kdcore_alignment import params

_SMALLEST = 1e-7
"""Least probability of the class of the rest: the gradient of log(1 - exp x) is infinite at 0."""


class ULD:
    """Splitter that sorts the classes of each model by probability."""

    joins_tokenizers = True

    @by_keywords(params.ULD)
    def __init__(self, params: params.ULD, context: BuildContext) -> None:
        self.merge = params.merge
        self.reads_spans = params.merge != "none"

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return {name: self._sorted(part, batch) for name, part in parts.items()}

    def _sorted(self, part: Part, batch: LogitBatch) -> Part:
        logp_student, logp_teacher = part.compared
        rests = rests_of(logp_student, batch) if self.reads_spans else None
        if rests is None:
            student, teacher = as_wide(descending(part.student), descending(part.teacher))
            return replace(part, student=student, teacher=teacher)
        merged = [
            descending(logp) + rest[..., None]
            for logp, rest in zip((logp_student, logp_teacher), rests, strict=True)
        ]
        student, teacher = as_wide(*merged)
        if self.merge == "rest":
            student, teacher = (
                torch.cat([probs, log_of_rest(rest)[..., None]], -1)
                for probs, rest in zip((student, teacher), rests, strict=True)
            )
        return replace(part, student=student, teacher=teacher, log_probs=True)


def descending(logits: Tensor) -> Tensor:
    """The logits of each position, the largest first.

    A teacher's logits have no gradient, so their order need not be known: numpy sorts such values
    alone, on a CPU 5 to 25 times as fast as torch.
    """
    constant = logits.device.type == "cpu" and not logits.requires_grad
    if constant and logits.dtype is torch.float32:
        return torch.from_numpy(-np.sort(-logits.numpy(), axis=-1))
    return logits.sort(-1, descending=True).values


def as_wide(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Append excluded classes to the narrower of two tensors, and one to two without classes."""
    wide = max(first.shape[-1], second.shape[-1], 1)  # a divergence may look for the best class
    padded = (F.pad(each, (0, wide - each.shape[-1]), value=LOG_ZERO) for each in (first, second))
    one, other = padded
    return one, other


def rests_of(student: Tensor, batch: LogitBatch) -> tuple[Tensor, Tensor] | None:
    """Compute what each model says of the other tokens of a span.

    Args:
        student: [1, T, K] log-probs of the student.
        batch: Its batch.

    Returns:
        The log-probs [1, T] of student and teacher; None for a teacher with the same tokens.
    """
    if batch.span is None or batch.teacher_rest is None:
        return None
    of_label = student.gather(-1, batch.labels[..., None])[..., 0]
    return rest_of_span(of_label, batch.span), batch.teacher_rest


def rest_of_span(logp: Tensor, span: Tensor) -> Tensor:
    """Sum the log-probs of the other tokens of each token's span.

    Args:
        logp: [1, T] log-probs of the labels.
        span: [1, T] numbers of their spans, not decreasing.

    Returns:
        The sums [1, T].
    """
    begins = span[0].diff(prepend=span[0, :1]) != 0
    number = begins.cumsum(0)
    whole = logp.new_zeros(logp.shape[1]).index_add(0, number, logp[0])
    return (whole[number] - logp[0])[None].clamp(max=0)


def log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)) for log-probs."""
    return torch.log(-torch.expm1(logp.clamp(max=-_SMALLEST)))
