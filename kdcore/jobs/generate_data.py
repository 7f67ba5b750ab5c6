"""The generate-data job: a teacher's responses to prompts, in a file that the chat source reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation
from kdcore.data.responses.endpoint.answers import EndpointAnswers
from kdcore.data.responses.file import Answerer, Numbered, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.errors import UserError, in_field
from kdcore.jobs.preflight.generate_data import _conversations
from kdcore.jobs.ray_workers import Cluster, connected, differs_here, spread
from kdcore.models.device import process_device
from kdcore.models.loading.load import digest_of, load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.facts import GeneratedResponses
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.today import pinned, today
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.parts.endpoint import EndpointSpec

FILE = "responses.jsonl"
"""The file of responses in the run folder."""


def generate_data(
    spec: GenerateDataSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    on: Cluster | None = None,
) -> Run:
    """Generate responses by a generate-data spec.

    ``run.json`` records the number of conversations, how many responses reached an end token, and
    the tokens and seconds of this call.

    Args:
        spec: The generate-data spec.
        registry: The components that the spec may name (default: the installed ones).
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished run is continued.
        progress: The display of stages and notes (default: none).
        on: The cluster whose workers answer the batches (default: this process).

    Returns:
        The run, whose folder holds the answered conversations.

    Raises:
        UserError: The folder, the model, the data or the cluster cannot be used (see
            `kdcore.runs.folder.Run.open`, `kdcore.models.loading.load`, `kdcore.data`,
            `kdcore.jobs.ray_workers`).
    """
    registry, progress = registry or installed(), progress or Silent()
    if on and isinstance(spec.teacher, EndpointSpec):
        raise UserError(
            "the teacher is behind an endpoint, which answers wherever the command runs",
            "remove --on",
        )
    with connected(on):
        run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
        with run.closed_after():
            _respond(spec, run, registry, progress, on)
    return run


def _respond(
    spec: GenerateDataSpec, run: Run, registry: Registry, progress: Progress, on: Cluster | None
) -> None:
    asked = _conversations(spec, registry)
    with in_field("teacher"):
        answerer = _answerer(spec, registry, progress, on)
    given = respond(asked, answerer, run.path(FILE), progress, field="source")
    ended = [m.ended for c in given.conversations for m in c.messages if m.role == "assistant"]
    run.update(
        responses=GeneratedResponses(
            conversations=len(given.conversations),
            left_out=len(asked) - len(given.conversations),
            responses=len(ended),
            ended=sum(ended),
            tokens=given.tokens,
            seconds=given.seconds,
        )
    )


def _answerer(
    spec: GenerateDataSpec, registry: Registry, progress: Progress, on: Cluster | None
) -> Answerer:
    if isinstance(spec.teacher, EndpointSpec):
        return EndpointAnswers(spec.teacher, spec.responses)
    if on:
        outline = load_model(spec.teacher, weights=False)
        return _AnswersOnRay(replace(outline, digest=digest_of(spec.teacher)), spec, progress)
    with progress.stage("load the model", 1) as stage:
        model = load_model(spec.teacher, device=process_device())
        stage.advance()
    return ModelAnswers(model, spec.responses, registry, progress.note, "source")


class _AnswersOnRay(ModelAnswers):
    """Plans the batches without the model's weights, and lets the workers of a cluster answer."""

    def __init__(self, model: LoadedModel, spec: GenerateDataSpec, progress: Progress) -> None:
        super().__init__(model, spec.responses, field="source")
        self._asked, self._progress = spec, progress

    def answers(self, batches: Sequence[Numbered]) -> Iterator[tuple[list[Conversation], int]]:
        """See `Answerer.answers`."""
        asked = self._asked.model_dump(mode="json")
        date = str(today().date())
        work = AnswersOfWorker(asked, self.settings, self.most_tokens(batches), date)

        def died(place: int, line: str) -> None:
            self._progress.note(f"batch {place + 1} of {len(batches)}: {line}")

        for _, answered in spread(work, batches, died=died):
            if isinstance(answered, UserError):
                raise answered
            yield answered


@dataclass
class AnswersOfWorker:
    """What a worker of a cluster does: it loads the model once, and answers batches.

    Attributes:
        asked: The generate-data spec as plain data.
        settings: See `Answerer.settings`.
        tokens: Maximum number of tokens that all workers generate, which decides on the engine.
        date: The date that chat templates print.
    """

    asked: dict[str, Any]
    settings: Mapping[str, Any]
    tokens: int
    date: str

    def __call__(self, batch: Numbered) -> tuple[list[Conversation], int]:
        """Answer a batch; see `ModelAnswers.answer`."""
        with pinned(self.date):
            return self._answers.answer(batch)

    @cached_property
    def _answers(self) -> ModelAnswers:
        spec: Any = GenerateDataSpec.model_validate(self.asked)
        model = load_model(spec.teacher, device=process_device())
        answers = ModelAnswers(model, spec.responses, field="source")
        if answers.settings != self.settings:
            raise differs_here("the teacher's files")
        answers.begin(self.tokens)
        return answers
