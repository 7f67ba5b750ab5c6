"""Declaration of the OpenVINO engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from kdcore import Component, Params, hookimpl


class OpenVinoParams(Params):
    """Parameters of the openvino engine."""

    weights: Literal["exact", "float16", "int8"] = Field(
        "exact",
        description="stored weights: exact stores a matrix in float16 if that rounds no weight by "
        "more than float32's own rounding of the largest one, otherwise in float32; float16 "
        "rounds all matrices; int8 rounds them to 256 levels a row, so the output is that of "
        "another model",
    )


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the engine."""
    yield Component(
        kind="engine",
        name="openvino",
        build="kdcore_openvino.engine:OpenVinoEngine",
        summary="runs a converted graph on a CPU, in float32 arithmetic; needs kdcore[openvino]",
        source="OpenVINO (Intel), Apache-2.0",
        params=OpenVinoParams,
    )
