"""The pluggy hooks. A plugin is a module (or object) named by an entry point of `GROUP`.

Within an API version hooks and records only gain members. This module imports no torch, and a
plugin's declaring module must not either: declaring is free, building is what costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy

from kdcore.components.component import Component
from kdcore.components.job import Job

if TYPE_CHECKING:
    import typer


API_VERSION = "v1"
GROUP = f"kdcore.{API_VERSION}"

hookspec = pluggy.HookspecMarker("kdcore")
hookimpl = pluggy.HookimplMarker("kdcore")


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
