"""The generate-data job: a teacher's responses to prompts, in a file that the chat source reads."""

from __future__ import annotations

from kdcore.components.registry import Registry, installed
from kdcore.data.responses.endpoint import EndpointAnswers
from kdcore.data.responses.file import Answerer, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.jobs.preflight.generate_data import _conversations
from kdcore.models.device import process_device
from kdcore.models.loading.load import load_model
from kdcore.runs.facts import GeneratedResponses
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
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

    Returns:
        The run, whose folder holds the answered conversations.

    Raises:
        UserError: The folder, the model or the data cannot be used (see
            `kdcore.runs.folder.Run.open`, `kdcore.models.loading.load`, `kdcore.data`).
    """
    registry, progress = registry or installed(), progress or Silent()
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        asked = _conversations(spec, registry)
        given = respond(asked, _answerer(spec, registry, progress), run.path(FILE), progress)
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
    return run


def _answerer(spec: GenerateDataSpec, registry: Registry, progress: Progress) -> Answerer:
    if isinstance(spec.teacher, EndpointSpec):
        return EndpointAnswers(spec.teacher, spec.responses)
    with progress.stage("load the model", 1) as stage:
        model = load_model(spec.teacher, device=process_device())
        stage.advance()
    return ModelAnswers(model, spec.responses, registry, progress.note)
