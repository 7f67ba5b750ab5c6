"""What generating data would do, found out without generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdcore.data.conversation import Conversation
from kdcore.data.responses.endpoint import EndpointAnswers
from kdcore.errors import UserError
from kdcore.jobs.preflight import estimates
from kdcore.method.protocols import DataSource
from kdcore.method.registry import Registry, installed
from kdcore.models.assembly import Assembly
from kdcore.models.loading import load_model
from kdcore.runs.folder import Run
from kdcore.specs.generate_data import EndpointSpec, GenerateDataSpec


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
