"""A number, or one that changes with progress."""

from __future__ import annotations

import math
from typing import TypeAlias

from kdcore.errors import UserError

Points: TypeAlias = list[tuple[float, float]]
"""``[(progress, value), ...]`` of rising progress: linear in between, held before and after."""


def value_at(schedule: float | Points, progress: float) -> float:
    """The schedule's value at a progress in [0, 1].

    Raises:
        UserError: A progress of NaN, which says that nobody knows it, where the value depends on
            it.
    """
    if not isinstance(schedule, list):
        return schedule
    if math.isnan(progress):
        raise UserError(
            "the method has a schedule, and the progress of the training is not known",
            "give steps=, the number of optimizer steps, and call step() after each of them",
        )
    before = [point for point in schedule if point[0] <= progress]
    after = [point for point in schedule if point[0] > progress]
    if not before or not after:
        return (before or after[:1])[-1][1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (progress - left) / (right - left)
