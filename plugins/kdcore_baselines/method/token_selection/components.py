"""Declarations of the gates that select tokens by a schedule. This module does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from kdcore import Component, Params, PositiveSchedule, Schedule
from kdcore.method.schedule import Points

MOST_RANKED = 2**24
"""The most values of which torch computes a quantile."""


def _between_zero_and_one(schedule: float | Points) -> float | Points:
    values = [value for _, value in schedule] if isinstance(schedule, list) else [schedule]
    if not 0 <= min(values) <= max(values) <= 1:
        raise ValueError("must be between 0 and 1 at every point")
    return schedule


class AdaKDParams(Params):
    """Parameters of the adakd gate: of its fraction, and of its temperatures."""

    start: float = Field(
        default=1.0, gt=0, le=1, description="fraction of positions to keep at the start"
    )
    least: float = Field(default=0.1, gt=0, le=1, description="minimum fraction")
    step: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="relative change of the fraction when the loss moves; 0 keeps it at start",
    )
    tolerance: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="relative change of the mean loss that moves the fraction",
    )
    decay: float = Field(default=0.99, ge=0, lt=1, description="decay of the running mean loss")
    warmup: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of the training after which the loss begins to move the fraction",
    )
    strength: float = Field(
        default=0.5,
        ge=-2,
        le=2,
        description="maximum of |log(factor of the temperature)|: the hardest tokens get "
        "exp(-strength), the easiest exp(strength); 0 leaves the temperature alone, a negative "
        "value softens the hard tokens instead",
    )


class SEKDParams(Params):
    """Parameters of the se_kd gate."""

    fraction: Annotated[PositiveSchedule, AfterValidator(_between_zero_and_one)] = Field(
        default=0.2, description="fraction of each row's positions to keep; may be a schedule"
    )
    window: Annotated[Schedule, AfterValidator(_between_zero_and_one)] = Field(
        default=1.0,
        description="place of the kept positions in the ranking of the row, from 0, the lowest "
        "entropies, to 1, the highest; may be a schedule",
    )


class SEKDQueueParams(Params):
    """Parameters of the se_kd_queue gate."""

    fraction: Annotated[PositiveSchedule, AfterValidator(_between_zero_and_one)] = Field(
        default=0.2, description="fraction of the positions to keep; may be a schedule"
    )
    queue: int = Field(
        default=30_000,
        ge=1,
        le=MOST_RANKED,
        description="number of entropies of earlier steps whose quantile is the threshold",
    )


TOKEN_SELECTION = (
    Component(
        kind="gate",
        name="adakd",
        build="kdcore_baselines.method.token_selection.adakd:AdaKD",
        summary="keeps a fraction of the hardest positions that follows the loss, and gives hard "
        "positions a lower temperature",
        source="AdaKD, arXiv 2510.11615, and its released code",
        params=AdaKDParams,
    ),
    Component(
        kind="gate",
        name="se_kd",
        build="kdcore_baselines.method.token_selection.se_kd:SEKD",
        summary="keeps the fraction of each row with the highest student entropy, or a window that "
        "moves up to it",
        source="SE-KD, arXiv 2602.01395, and its released code",
        params=SEKDParams,
    ),
    Component(
        kind="gate",
        name="se_kd_queue",
        build="kdcore_baselines.method.token_selection.se_kd:SEKDQueue",
        summary="keeps positions whose student entropy exceeds a quantile of the last steps' "
        "entropies",
        source="SE-KD, arXiv 2602.01395, and its released code (global-level selection)",
        params=SEKDQueueParams,
    ),
)
