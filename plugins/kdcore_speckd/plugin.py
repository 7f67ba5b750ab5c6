"""Declarations of the SpecKD gate, with the defaults of both versions of its paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from kdcore import Component, Params, hookimpl
from kdcore.specs.parts.fields import MOST_ITEMS


class SpecKDParams(Params):
    """Parameters of the speckd gate, with the defaults of the paper's second version."""

    verification: Literal["greedy", "sampling", "expected"] = Field(
        default="greedy",
        description="acceptance test: greedy accepts if the student's most likely token is in the "
        "teacher's top k; sampling accepts if one of k student samples passes the test of "
        "speculative decoding; expected gives the probability of that",
    )
    k: int = Field(
        default=5,
        ge=1,
        le=MOST_ITEMS,
        description="number of top teacher tokens (greedy), or number of student samples",
    )
    beta: float = Field(default=0.01, ge=0, le=1, description="weight of a rejected position")


class SpecKDv1Params(SpecKDParams):
    """Parameters of the speckd_v1 gate: the paper's first version masks rejected positions."""

    beta: float = Field(default=0.0, ge=0, le=1, description="weight of a rejected position")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the gate under both names."""
    yield Component(
        kind="gate",
        name="speckd",
        build="kdcore_speckd.gate:SpecKD",
        summary="keeps the positions where the teacher accepts the student's proposal",
        source="SelecTKD, arXiv 2510.24021v2",
        params=SpecKDParams,
    )
    yield Component(
        kind="gate",
        name="speckd_v1",
        build="kdcore_speckd.gate:speckd_v1",
        summary="like speckd, with weight 0 for rejected positions",
        source="SpecKD, arXiv 2510.24021v1",
        params=SpecKDv1Params,
    )
