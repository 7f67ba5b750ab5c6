"""What this package adds to kdcore: one gate, under the defaults of each version of its paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from kdcore import Component, Params, hookimpl


class SpecKDParams(Params):
    """The second version's defaults."""

    verification: Literal["greedy", "sampling", "expected"] = Field(
        default="greedy",
        description="greedy: the student's most likely token is among the teacher's k; sampling: "
        "one of k tokens drawn from the student passes the test of speculative decoding; "
        "expected: the probability of that instead of a draw",
    )
    k: int = Field(
        default=5,
        ge=1,
        description="how many of the teacher's tokens are good enough, or how many draws",
    )
    beta: float = Field(default=0.01, ge=0, le=1, description="weight of a refused position")


class SpecKDv1Params(SpecKDParams):
    """The first version masks refused positions altogether."""

    beta: float = Field(default=0.0, ge=0, le=1, description="weight of a refused position")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the gate."""
    yield Component(
        kind="gate",
        name="speckd",
        build="kdcore_speckd.gate:SpecKD",
        summary="keep the positions where the teacher accepts what the student proposes",
        source="SelecTKD, arXiv 2510.24021v2",
        params=SpecKDParams,
    )
    yield Component(
        kind="gate",
        name="speckd_v1",
        build="kdcore_speckd.gate:speckd_v1",
        summary="the same, refused positions weighing nothing",
        source="SpecKD, arXiv 2510.24021v1",
        params=SpecKDv1Params,
    )
