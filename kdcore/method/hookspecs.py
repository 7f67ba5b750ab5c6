"""The pluggy hooks. A plugin is a module (or object) named by an entry point of `GROUP`.

Within an API version hooks and records only gain members. This module imports no torch, and a
plugin's declaring module must not either: declaring is free, building is what costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy
from pydantic import BaseModel

from kdcore.method.job import Job
from kdcore.method.params import Params

if TYPE_CHECKING:
    import typer


API_VERSION = "v1"
GROUP = f"kdcore.{API_VERSION}"

hookspec = pluggy.HookspecMarker("kdcore")
hookimpl = pluggy.HookimplMarker("kdcore")

Kind = Literal[
    "gate",
    "splitter",
    "divergence",
    "momentum",
    "source",
    "drafter",
    "tree",
    "verifier",
    "engine",
    "score",
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
    "engine": "Engine",
    "score": "AnswerScore",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One declared method.

    Attributes:
        kind: Kind of the component.
        name: Name in a spec: a-z, 0-9 and _.
        build: Builder, called as ``build(params, context)``; it returns an object that satisfies
            the kind's Protocol. A package names it ``module:attribute``, which is imported only
            when a run uses it; a notebook or a script passes the class or function itself
            (`registry_with`).
        summary: One line for ``plugins list``.
        source: Paper or code that the method comes from.
        params: Subclass of `Params`, whose fields all have a description.
        licence: Licence of that paper or code, if known.
    """

    kind: Kind
    name: str
    build: str | Callable[[Any, Any], Any]
    summary: str
    source: str
    params: type[BaseModel] = Params
    licence: str = "method described in a public paper; implementation Apache-2.0"

    @property
    def place(self) -> str:
        """Place of the builder's definition, as ``module:attribute``."""
        if isinstance(self.build, str):
            return self.build
        made_by: Any = self.build
        named = made_by if hasattr(made_by, "__qualname__") else type(made_by)
        return f"{named.__module__}:{named.__qualname__}"


class RunFolder(Protocol):
    """What a plugin's hooks see of a run."""

    @property
    def folder(self) -> Path:
        """The run folder."""

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; {} when it does not exist."""

    def spec(self) -> dict[str, Any]:
        """The resolved spec."""


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
    """Metrics of a training run were logged at an optimizer step."""


@hookspec
def kdcore_run_ended(run: RunFolder, status: Literal["done", "failed", "interrupted"]) -> None:
    """A training run is over; its folder says so, and is still held."""
