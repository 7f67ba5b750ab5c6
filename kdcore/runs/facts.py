"""The record of run.json: a run's status, versions, models and inputs."""

from __future__ import annotations

import functools
import json
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

from kdcore.runs.record_files import LEFT_OUT, RecordFile


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """The origin of a model.

    Attributes:
        name: The model's name in the spec.
        digest: The sha256 of the model's config and weights.
    """

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class RunInput:
    """An input of a run, see `kdcore.runs.inputs`.

    Attributes:
        asked: The sha256 of the spec's fields that describe the input.
        digest: The digest of the content that was read.
    """

    asked: str
    digest: str


@dataclass(frozen=True, slots=True)
class GeneratedResponses:
    """Counts of a generate-data job.

    Attributes:
        conversations: Number of answered conversations.
        left_out: Number of conversations without an answer.
        responses: Number of responses in the answered conversations.
        ended: Number of responses that reached an end token.
        tokens: Number of tokens generated in the last attempt.
        seconds: Seconds of generation in the last attempt.
    """

    conversations: int
    left_out: int
    responses: int
    ended: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run, as run.json holds them.

    Attributes:
        status: ``running``, ``done``, ``failed`` or ``interrupted``.
        started: Start of the last attempt (ISO 8601).
        date: Date that chat templates print in this run (ISO 8601).
        ended: End of the last attempt (ISO 8601).
        versions: Package -> version, of kdcore and its main dependencies.
        plugins: Plugin -> distribution and version.
        plugin_faults: Plugin and hook -> the first exception that the hook raised.
        inputs: Input -> its digests.
        teacher: The teacher, if the run loads one.
        student: The initial student of a distillation.
        reference: The reference model that a gate names.
        target: The target of a drafter.
        responses: The counts of a generate-data job.
    """

    status: str = "unknown"
    started: str = ""
    date: Annotated[str | None, LEFT_OUT] = None
    versions: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    teacher: Annotated[ModelOrigin | None, LEFT_OUT] = None
    student: Annotated[ModelOrigin | None, LEFT_OUT] = None
    reference: Annotated[ModelOrigin | None, LEFT_OUT] = None
    target: Annotated[ModelOrigin | None, LEFT_OUT] = None
    inputs: Annotated[dict[str, RunInput], LEFT_OUT] = field(default_factory=dict)
    responses: Annotated[GeneratedResponses | None, LEFT_OUT] = None
    plugin_faults: Annotated[dict[str, str], LEFT_OUT] = field(default_factory=dict)
    ended: Annotated[str | None, LEFT_OUT] = None


_PACKAGES = ("kdcore", "torch", "transformers", "accelerate", "peft", "safetensors", "pluggy")
RUN_FACTS = RecordFile("run.json", RunFacts, indent=2)


def shown_versions() -> dict[str, str]:
    """Package -> version, of Python, kdcore and its main dependencies."""
    found = {name: version_of(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def date_in(*folders: Path) -> str | None:
    """Read the date of a run, or of the comparison that contains it.

    Args:
        *folders: The run folder and the folders around it.

    Returns:
        The date in the first run.json that has one, or None.
    """
    for folder in folders:
        try:
            found = json.loads((folder / "run.json").read_text("utf-8"))["date"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(found, str):
            return found
    return None


@functools.cache
def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, whose metadata takes long to read."""
    return metadata.version(distribution)
