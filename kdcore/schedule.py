"""A number, or one that changes with progress."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator

Points: TypeAlias = list[tuple[float, float]]


def _rising(schedule: float | Points) -> float | Points:
    if isinstance(schedule, list):
        places = [place for place, _ in schedule]
        if not places or places != sorted(set(places)) or places[0] < 0 or places[-1] > 1:
            raise ValueError("[[progress, value], ...] needs rising progress between 0 and 1")
    return schedule


Schedule: TypeAlias = Annotated[float | Points, AfterValidator(_rising)]
"""``0.5``, or ``[[0, 0.1], [1, 0.9]]``: linear in between, held before and after."""


def value_at(schedule: float | Points, progress: float) -> float:
    """The schedule's value at a progress in [0, 1]."""
    if not isinstance(schedule, list):
        return schedule
    before = [point for point in schedule if point[0] <= progress]
    after = [point for point in schedule if point[0] > progress]
    if not before or not after:
        return (before or after[:1])[-1][1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (progress - left) / (right - left)
