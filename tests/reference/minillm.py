"""MiniLLM in plain float64: numpy, one token of one response after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def advantages(
    rewards: Sequence[float],
    importance: Sequence[float],
    *,
    length_norm: bool,
    own: bool,
    gamma: float,
    clip: float | None,
) -> Array:
    """The factor of -log q(y_t) beside the importance, for each token of a response."""
    found = []
    for t, ratio in enumerate(importance):
        first = t if own else t + 1
        later = [gamma ** (i - first) * rewards[i] for i in range(first, len(rewards))]
        total = sum(later)
        if length_norm and later:
            total /= len(later)
        if clip is not None:
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            if ratio * total > clipped * total:
                total = 0.0  # the minimum of the two is a constant
        found.append(total)
    return np.array(found)


def importance(student: float, teacher: float, share: float) -> float:
    """q / (share p + (1 - share) q) of a token with these log-probs."""
    q, p = np.exp(student), np.exp(teacher)
    return float(q / (share * p + (1 - share) * q))
