"""run.json: how a run stands, and what it was made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from kdcore.runs.record_files import LEFT_OUT, RecordFile


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """Where a model came from.

    Attributes:
        name: The name that the spec gives.
        digest: The sha256 of its config and weights.
    """

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class RunInput:
    """One thing that a run read, see `kdcore.runs.inputs`.

    Attributes:
        asked: The sha256 of all that the spec says of it.
        digest: The digest of what was read.
    """

    asked: str
    digest: str


@dataclass(frozen=True, slots=True)
class GeneratedResponses:
    """What the job that only generates made.

    Attributes:
        conversations: How many were answered.
        left_out: How many were not.
        responses: How many responses the conversations have.
        ended: How many of these ended by themselves.
        tokens: How many tokens were generated in the last attempt.
        seconds: What that took.
    """

    conversations: int
    left_out: int
    responses: int
    ended: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RunFacts:
    """run.json.

    Attributes:
        status: ``running``, or how the run ended.
        started: When the last attempt began (ISO 8601).
        ended: When it ended.
        versions: Package -> version, of kdcore and what it computes with.
        plugins: Plugin -> its distribution and version.
        plugin_faults: Plugin and hook -> the first exception that it raised there.
        inputs: What the run read -> its digests.
        teacher: The teacher, if the run loads one.
        student: The student that a distillation begins with.
        reference: The third model that a gate asks for.
        target: The model that a drafter drafts for.
        responses: What the job ``generate-data`` made.
    """

    status: str = "unknown"
    started: str = ""
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


RUN_FACTS = RecordFile("run.json", RunFacts, indent=2)
