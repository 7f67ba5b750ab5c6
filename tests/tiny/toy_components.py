"""A registry of components that do nothing, for tests of specs and of the command line."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import Field

from kdcore.components.choice import GateChoice
from kdcore.components.component import Component, Params
from kdcore.components.hookspecs import hookimpl
from kdcore.components.registry import Registry
from kdcore.specs.jobs import kdcore_jobs as kdcore_jobs  # a hook, and so this module's too
from kdcore.specs.parts.fields import InputPath
from kdcore.specs.parts.schedule import Schedule


class SpeckdParams(Params):
    k: Annotated[int, Field(ge=1, description="how many of the teacher's tokens count")] = 5
    beta: Annotated[float, Field(ge=0, le=1, description="weight of a refused position")] = 0.01
    variant: Literal["greedy", "sampling"] = "greedy"


class RandomParams(Params):
    rate: float = Field(ge=0, le=1, description="share of positions")


class InvertedParams(Params):
    gate: GateChoice = Field(description="the gate to invert")


class SkewParams(Params):
    alpha: Schedule = Field(0.1, description="share of the other model")


class JsonlParams(Params):
    path: InputPath = Field(description="a file of conversations")
    fields: dict[str, str] = Field({})


def _component(kind: str, name: str, params: type[Params] = Params) -> Component:
    return Component(
        kind=kind,  # type: ignore[arg-type]
        name=name,
        build=f"tests.tiny.toy_components:{name.title()}",
        summary=f"a toy {kind}",
        source="none",
        params=params,
    )


@hookimpl
def kdcore_components() -> list[Component]:
    return [
        _component("gate", "all"),
        _component("gate", "speckd", SpeckdParams),
        _component("gate", "random", RandomParams),
        _component("gate", "inverted", InvertedParams),
        _component("splitter", "target_split"),
        _component("divergence", "forward_kl"),
        _component("divergence", "skew", SkewParams),
        _component("momentum", "shared"),
        _component("momentum", "deepkd"),
        _component("source", "jsonl", JsonlParams),
    ]


def registry() -> Registry:
    """A fresh registry that holds the toys."""
    found = Registry()
    found.register(sys.modules[__name__], "toys", "toys", "1.0")
    return found


class Speckd:
    """Accepts what the teacher would have."""
