"""A number, or one that changes with progress."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from kdcore.errors import UserError

MOST = 1e9
_Progress = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
_Value = Annotated[float, Field(ge=-MOST, le=MOST)]
Points: TypeAlias = list[tuple[_Progress, _Value]]


def _rising(value: Any, handler: ValidatorFunctionWrapHandler) -> float | Points:
    try:
        schedule: float | Points = handler(value)
    except ValidationError:
        raise ValueError(
            f"must be a number or [[progress, value], ...], with values of at most {MOST:g}"
        ) from None
    if isinstance(schedule, list):
        places = [place for place, _ in schedule]
        if not places or places != sorted(set(places)) or places[0] < 0 or places[-1] > 1:
            raise ValueError(
                "the progress values in [[progress, value], ...] must increase and lie between "
                "0 and 1"
            )
    return schedule


def _positive(schedule: float | Points) -> float | Points:
    values = [value for _, value in schedule] if isinstance(schedule, list) else [schedule]
    if min(values) <= 0:
        raise ValueError("must be greater than 0 at every point")
    return schedule


Schedule: TypeAlias = Annotated[_Value | Points, WrapValidator(_rising)]
"""``0.5``, or ``[[0, 0.1], [1, 0.9]]``: linear in between, held before and after."""

PositiveSchedule: TypeAlias = Annotated[Schedule, AfterValidator(_positive)]
"""The same, above 0."""


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
