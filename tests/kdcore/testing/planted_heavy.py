"""Declares a sound gate badly: importing this costs a torch, and its params say nothing."""

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict

from kdcore.components.component import Component
from kdcore.components.hookspecs import hookimpl


class Undescribed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rate: float = torch.pi


class Thawed(BaseModel):
    model_config = ConfigDict(extra="forbid")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    build = "tests.kdcore.testing.components:SoundGate"
    yield Component(
        kind="gate",
        name="undescribed",
        build=build,
        summary="for a test",
        source="none",
        params=Undescribed,
    )
    yield Component(
        kind="gate", name="thawed", build=build, summary="for a test", source="none", params=Thawed
    )
