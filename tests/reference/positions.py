"""Formulas at each position of a batch, and the means of values at positions.

A row whose mask is empty is no sequence: it is not counted, so padding a batch with empty rows
changes nothing. A batch without any masked position is an error of the caller.
"""

from collections.abc import Callable

import numpy as np


def per_position(formula: Callable[..., float], *arrays: np.ndarray) -> np.ndarray:
    """formula(a[b, t], ...) at each row b and position t: [B, T, ...] each -> [B, T].

    Logits [B, T, V] hand the formula a vector [V], labels [B, T] a single number. The formula
    may return a vector, such as a cotangent [V]; the result is then [B, T, V].
    """
    rows, positions = arrays[0].shape[:2]
    return np.array(
        [
            [formula(*(array[b, t] for array in arrays)) for t in range(positions)]
            for b in range(rows)
        ]
    )


def sequence_mean(values: np.ndarray, weights: np.ndarray, mask: np.ndarray) -> float:
    """Mean over sequences of (1 / |y|) sum_t weight_t value_t. All [B, T]."""
    means = []
    for b in range(len(mask)):
        length = int(mask[b].sum())
        if length > 0:
            total = sum(weights[b, t] * values[b, t] for t in range(len(mask[b])) if mask[b, t])
            means.append(total / length)
    return float(np.mean(means))


def token_mean(values: np.ndarray, weights: np.ndarray, mask: np.ndarray) -> float:
    """(1 / number of masked positions in the batch) sum weight value. All [B, T]."""
    return float((weights * values)[mask].sum() / mask.sum())


def accepted_mean(values: np.ndarray, weights: np.ndarray, mask: np.ndarray) -> float:
    """Mean over sequences of (1 / sum_t weight_t) sum_t weight_t value_t. All [B, T].

    A sequence whose weights are all 0 counts with 0: it has positions, but no loss.
    """
    means = []
    for b in range(len(mask)):
        if mask[b].any():
            total = sum(weights[b, t] * values[b, t] for t in range(len(mask[b])) if mask[b, t])
            weight = sum(weights[b, t] for t in range(len(mask[b])) if mask[b, t])
            means.append(total / weight if weight > 0 else 0.0)
    return float(np.mean(means))
