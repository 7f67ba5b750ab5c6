"""The pluggy hooks. A plugin is a module (or object) named by an entry point of `GROUP`.

Within an API version hooks and records only gain members. This module imports no torch, and a
plugin's declaring module must not either: declaring is free, building is what costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pluggy
from pydantic import BaseModel

from kdcore.method.job import Job

if TYPE_CHECKING:
    import typer

    from kdcore.method.protocols import RunFolder

API_VERSION = "v1"
GROUP = f"kdcore.{API_VERSION}"

hookspec = pluggy.HookspecMarker("kdcore")
hookimpl = pluggy.HookimplMarker("kdcore")

Kind = Literal[
    "gate", "splitter", "divergence", "momentum", "source", "drafter", "tree", "verifier"
]
PROTOCOL_OF: dict[str, str] = {
    "gate": "Gate",
    "splitter": "KnowledgeSplitter",
    "divergence": "Divergence",
    "momentum": "MomentumPolicy",
    "source": "DataSource",
    "drafter": "Drafter",
    "tree": "TreeBuilder",
    "verifier": "Verifier",
}


class NoParams(BaseModel):
    """The params of a component that has none."""

    model_config = {"extra": "forbid", "frozen": True, "defer_build": True}


@dataclass(frozen=True, slots=True)
class Component:
    """One declared method.

    build: ``module:attribute``, imported only when a run asks for it, then called as
        ``attribute(params, context)`` and expected to satisfy the kind's Protocol.
    params: a frozen pydantic model that forbids extra keys; every field has a description.
    summary: one line for ``plugins list``. source: the paper or code the method comes from.
    licence: of that paper or code where it says one, else what is known.
    """

    kind: Kind
    name: str
    build: str
    summary: str
    source: str
    params: type[BaseModel] = NoParams
    licence: str = "method described in a public paper; implementation Apache-2.0"


@hookspec
def kdcore_components() -> Iterable[Component]:  # type: ignore[empty-body]
    """Declare components."""


@hookspec
def kdcore_jobs() -> Iterable[Job]:  # type: ignore[empty-body]
    """Declare jobs. kdcore's own are declared through this hook too, in `kdcore.specs.jobs`."""


@hookspec
def kdcore_commands(app: typer.Typer) -> None:
    """Add commands to the command line. Called once at start: import nothing heavy."""


@hookspec
def kdcore_run_started(run: RunFolder) -> None:
    """A training run's folder exists and its spec is resolved; nothing is loaded yet.

    Of the jobs that train, distill and train-drafter, also as cells of a comparison. Of several
    processes the one that writes the folder tells.
    """


@hookspec
def kdcore_step_done(run: RunFolder, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics of a training run were logged at an optimiser step."""


@hookspec
def kdcore_run_ended(run: RunFolder, status: Literal["done", "failed", "interrupted"]) -> None:
    """A training run is over; its folder says so, and is still held."""
