"""Declaration of the gate. kdcore imports this module when it starts: do not import torch."""

from collections.abc import Iterable

from pydantic import Field

from kdcore import Component, Params, hookimpl


class MarginParams(Params):
    """Parameters of the margin gate."""

    least: float = Field(default=1.0, ge=0, description="minimum margin of a kept position in nats")
    floor: float = Field(default=0.0, ge=0, le=1, description="weight of the other positions")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the gate."""
    yield Component(
        kind="gate",
        name="margin",
        build="margin_gate.gate:Margin",
        summary="keeps the positions where the teacher's best token leads by a margin",
        source="margin sampling of active learning, adapted",
        params=MarginParams,
        licence="MIT",
    )
