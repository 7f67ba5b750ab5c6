"""The dynamic top-k mask: which non-label classes NCKD compares, and how many as time goes.

`progress` is in [0, 1]. Equal teacher logits: the lower class first. C classes in all, so
C - 1 non-label ones.
"""

import math

import numpy as np


def top_k_mask(teacher: np.ndarray, label: int, k: int) -> np.ndarray:
    """The teacher's k most likely non-label classes, [V] bool: exactly k of them, and all of
    them from k = V - 1 on. k < 1 is an error."""
    if k < 1:
        raise ValueError("an empty set of classes")
    non_label = [v for v in range(len(teacher)) if v != label]
    kept = np.zeros(len(teacher), dtype=bool)
    kept[sorted(non_label, key=lambda v: -teacher[v])[:k]] = True
    return kept


def released_top_k_mask(teacher: np.ndarray, label: int, k: int) -> np.ndarray:
    """As the released code does it: the label is ranked with the rest and then taken out, so
    k - 1 classes stay where it is among the first k."""
    kept = np.zeros(len(teacher), dtype=bool)
    kept[sorted(range(len(teacher)), key=lambda v: -teacher[v])[:k]] = True
    kept[label] = False
    return kept


def three_phases(
    progress: float,
    start: float,
    hold: float,
    end: float,
    borders: tuple[float, float] = (1 / 3, 2 / 3),
) -> float:
    """Linear from `start` to `hold` up to the first border (easy), `hold` up to the second
    (transition), linear from `hold` to `end` up to progress 1 (hard)."""
    first, second = borders
    if progress < first:
        return start + (hold - start) * progress / first
    if progress <= second:
        return hold
    return hold + (end - hold) * (progress - second) / (1 - second)


def whole_k(k: float, classes: int) -> int:
    """The nearest whole number of classes (a half goes to the even one), from 1 to C - 1."""
    return min(max(1, round(k)), classes - 1)


def linear_k(
    progress: float,
    classes: int,
    k_star: int,
    start_fraction: float = 0.05,
    borders: tuple[float, float] = (1 / 3, 2 / 3),
) -> int:
    """K of a classifier: 5 % of the classes to K*, hold K*, K* to C - 1."""
    start, end = start_fraction * classes, classes - 1
    return whole_k(three_phases(progress, start, k_star, end, borders), classes)


def log_k(
    progress: float,
    classes: int,
    start: int = 16,
    k_star: int = 256,
    borders: tuple[float, float] = (1 / 3, 2 / 3),
) -> int:
    """K of a language model: the same phases, straight in log K, from 16 to 256 to V (of which
    V - 1 can be kept)."""
    exponent = three_phases(progress, math.log(start), math.log(k_star), math.log(classes), borders)
    return whole_k(math.exp(exponent), classes)
