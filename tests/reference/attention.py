"""Distances of attention maps, one query at a time.

Scores are [A, S] float64: those of a query for S keys in each of A heads, before the softmax;
``seen`` [S] says which keys it sees.
"""

import math

import numpy as np


def weights(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[A, S] softmax over the seen keys; 0 elsewhere."""
    found = np.zeros_like(scores)
    for head, row in enumerate(scores):
        powers = [math.exp(score - row[seen].max()) for score in row[seen]]
        found[head, seen] = np.array(powers) / sum(powers)
    return found


def of_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """[heads, S] the mean over each len(values) / heads successive heads."""
    count = len(values) // heads
    return np.stack([values[count * i : count * (i + 1)].mean(0) for i in range(heads)])


def distance(
    student: np.ndarray, teacher: np.ndarray, seen: np.ndarray, kind: str, heads: int
) -> float:
    """The distance of two maps, compared in a number of heads."""
    if kind == "mse_of_scores":
        ours, theirs = (of_heads(each, heads) for each in (student, teacher))
    else:
        ours, theirs = (of_heads(weights(each, seen), heads) for each in (student, teacher))
    total = 0.0
    for head in range(heads):
        a, b = ours[head][seen], theirs[head][seen]
        if kind == "kl":
            total += sum(q * math.log(q / p) for p, q in zip(a, b, strict=True))
        else:
            total += sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / seen.sum()
    return total / heads
