"""Preflight of generate-data specs: resolve everything and generate nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation
from kdcore.data.responses.endpoint.answers import EndpointAnswers
from kdcore.data.source import DataSource
from kdcore.errors import UserError, in_field
from kdcore.jobs.preflight import estimates
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.runs.folder import Run
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.parts.endpoint import EndpointSpec


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """The findings of `preflight_generation`.

    Attributes:
        teacher: The teacher's name.
        conversations: Number of conversations.
        responses: Number of responses to generate.
        tokens: Maximum of generated tokens.
        seconds: Estimated time of a local model; None behind an endpoint.
    """

    teacher: str
    conversations: int
    responses: int
    tokens: int
    seconds: float | None


def preflight_generation(
    spec: GenerateDataSpec, *, registry: Registry | None = None
) -> GenerationReport:
    """Resolve a generate-data spec, without weights and without requests to an endpoint.

    Args:
        spec: The generate-data spec.
        registry: The components that the spec may name (default: the installed ones).

    Returns:
        The findings.

    Raises:
        UserError: The job could not start; the message states the first reason.
    """
    Run(spec.run, planned=True).refuse_foreign()
    asked = _conversations(spec, registry or installed())
    count = sum(c.turns for c in asked)
    tokens = count * spec.responses.max_new_tokens
    if isinstance(spec.teacher, EndpointSpec):
        with in_field("source"):
            EndpointAnswers(spec.teacher, spec.responses).plan(asked)
        return GenerationReport(spec.teacher.model, len(asked), count, tokens, None)
    with in_field("teacher"):
        teacher = load_model(spec.teacher, weights=False)
    config = teacher.model.config.get_text_config()
    speed = estimates.throughput(1024, config.hidden_size, teacher.model.dtype)
    seconds = estimates.generating(teacher, tokens, speed)
    return GenerationReport(teacher.name, len(asked), count, tokens, seconds)


def _conversations(spec: GenerateDataSpec, registry: Registry) -> Sequence[Conversation]:
    with in_field("source"):
        source: DataSource = Assembly(registry).build(spec.source)
        asked = source.read()
    if not all(isinstance(example, Conversation) for example in asked):
        raise UserError(
            f"source '{spec.source.name}' does not contain conversations",
            "choose a source of conversations, e.g. chat",
            "source",
        )
    return asked
