"""What this package adds to kdcore. It is imported whenever kdcore starts, so no torch here."""

from collections.abc import Iterable

from pydantic import Field

from kdcore import Component, Params, hookimpl


class MarginParams(Params):
    """What a spec may write beside the name."""

    least: float = Field(
        default=1.0, ge=0, description="smallest margin of a kept position, in nats"
    )
    floor: float = Field(default=0.0, ge=0, le=1, description="weight of the other positions")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the gate."""
    yield Component(
        kind="gate",
        name="margin",
        build="margin_gate.gate:Margin",
        summary="keep the positions where the teacher's best token is far ahead of the second",
        source="the margin of active learning, put to another use",
        params=MarginParams,
        licence="MIT",
    )
