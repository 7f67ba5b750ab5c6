"""ULD and GOLD in plain float64: numpy, one span after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sorted_distance(teacher: Array, student: Array) -> float:
    """sum_i |p_(i) - q_(i)| of two vectors of probabilities."""
    size = max(len(teacher), len(student))
    one, other = (np.pad(np.sort(each)[::-1], (0, size - len(each))) for each in (teacher, student))
    return float(np.abs(one - other).sum())


def of_span(logits: Array, labels: Sequence[int], base: int) -> Array:
    """The distribution at a span's token ``base``, times the probabilities of its other tokens."""
    probs = softmax(logits)
    others = [probs[n, label] for n, label in enumerate(labels) if n != base % len(labels)]
    return probs[base] * float(np.prod(others))


def generalised_jsd(teacher: Array, student: Array, beta: float) -> float:
    """beta KL(p || m) + (1 - beta) KL(q || m) of parts of two distributions."""
    mixed = beta * teacher + (1 - beta) * student
    kl_teacher = float((teacher * np.log(teacher / mixed)).sum())
    return beta * kl_teacher + (1 - beta) * float((student * np.log(student / mixed)).sum())
