"""From a value and a weight per position [B, T] to one number.

A row whose mask is empty is no sequence: it is not counted, so padding a batch with empty rows
changes nothing. A batch without any masked position is an error of the caller.
"""

import numpy as np


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
