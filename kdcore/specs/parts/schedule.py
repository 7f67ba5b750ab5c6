"""How a spec writes a number, or one that changes with progress."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from kdcore.method.schedule import Points
from kdcore.specs.parts.fields import MOST

_Progress = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
_Value = Annotated[float, Field(ge=-MOST, le=MOST)]


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


Schedule: TypeAlias = Annotated[_Value | list[tuple[_Progress, _Value]], WrapValidator(_rising)]
"""``0.5``, or ``[[0, 0.1], [1, 0.9]]``: linear in between, held before and after."""

PositiveSchedule: TypeAlias = Annotated[Schedule, AfterValidator(_positive)]
"""The same, above 0."""

COLDEST, HOTTEST = 1e-3, 100.0


def _tempered(schedule: float | Points) -> float | Points:
    values = [value for _, value in schedule] if isinstance(schedule, list) else [schedule]
    if not COLDEST <= min(values) <= max(values) <= HOTTEST:
        raise ValueError(
            f"must be between {COLDEST:g} and {HOTTEST:g} at every point, as rounding errors "
            "replace the loss beyond"
        )
    return schedule


Temperature: TypeAlias = Annotated[PositiveSchedule, AfterValidator(_tempered)]
"""A temperature of the loss. Logits divided by more differ by less than float32 resolves after
their softmax, and tau^2 multiplies what is left; with less, tau^2 leaves no loss."""
