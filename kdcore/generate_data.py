"""Let a teacher answer prompts: from a spec to a file that the chat source reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdcore import estimates
from kdcore.assembly import Assembly
from kdcore.data.conversation import Conversation
from kdcore.data.endpoint_answers import EndpointAnswers
from kdcore.data.generation import Answerer, respond
from kdcore.data.model_answers import ModelAnswers
from kdcore.data_specs import EndpointSpec, GenerateDataSpec
from kdcore.errors import UserError
from kdcore.models import load_model
from kdcore.progress import Progress, Silent
from kdcore.protocols import DataSource
from kdcore.registry import Registry, installed
from kdcore.runs import Run

FILE = "responses.jsonl"
"""What comes out, in the run folder."""


def generate_data(
    spec: GenerateDataSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Carry out a spec; the returned run's folder holds the conversations, answered.

    ``run.json`` then says how many there are, how many of their responses ended by themselves,
    and what generating took this time.
    Raises UserError for what the user can mend (see `kdcore.runs.Run.open`, `kdcore.models`,
    `kdcore.data`).
    """
    registry, progress = registry or installed(), progress or Silent()
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        asked = _conversations(spec, registry)
        given = respond(asked, _answerer(spec, progress), run.path(FILE), progress)
        answers = [m for c in given.conversations for m in c.messages if m.role == "assistant"]
        run.update(
            responses={
                "conversations": len(given.conversations),
                "left_out": len(asked) - len(given.conversations),
                "responses": len(answers),
                "ended": sum(answer.ended for answer in answers),
                "tokens": given.tokens,
                "seconds": given.seconds,
            }
        )
    return run


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What `preflight_generation` found.

    teacher: its name. conversations, responses: how many are asked for. tokens: generated at the
    most. seconds: what a local model needs for as many; None behind an endpoint.
    """

    teacher: str
    conversations: int
    responses: int
    tokens: int
    seconds: float | None


def preflight_generation(
    spec: GenerateDataSpec, *, registry: Registry | None = None
) -> GenerationReport:
    """Resolve all that the job needs, without weights and without asking an endpoint anything.

    Raises UserError for the first thing that would stop it.
    """
    Run(spec.run).refuse_foreign()
    asked = _conversations(spec, registry or installed())
    count = sum(c.turns for c in asked)
    tokens = count * spec.responses.max_new_tokens
    if isinstance(spec.teacher, EndpointSpec):
        EndpointAnswers(spec.teacher, spec.responses).plan(asked)
        return GenerationReport(spec.teacher.model, len(asked), count, tokens, None)
    teacher = load_model(spec.teacher, weights=False)
    config = teacher.model.config.get_text_config()
    speed = estimates.throughput(1024, config.hidden_size, getattr(torch, spec.teacher.dtype))
    seconds = estimates.generating(teacher, tokens, speed)
    return GenerationReport(teacher.name, len(asked), count, tokens, seconds)


def _conversations(spec: GenerateDataSpec, registry: Registry) -> Sequence[Conversation]:
    source: DataSource = Assembly(registry).build(spec.source)
    asked = source.read()
    if not all(isinstance(example, Conversation) for example in asked):
        raise UserError(
            f"source '{spec.source.name}' has no prompts to answer",
            "name a source of conversations, e.g. chat",
        )
    return asked


def _answerer(spec: GenerateDataSpec, progress: Progress) -> Answerer:
    if isinstance(spec.teacher, EndpointSpec):
        return EndpointAnswers(spec.teacher, spec.responses)
    with progress.stage("load the model", 1) as stage:
        model = load_model(spec.teacher)
        stage.advance()
    return ModelAnswers(model, spec.responses)
