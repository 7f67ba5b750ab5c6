"""Let a teacher answer prompts: from a spec to a file that the chat source reads."""

from __future__ import annotations

from kdcore.data.responses.endpoint import EndpointAnswers
from kdcore.data.responses.file import Answerer, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.jobs.preflight.generate_data import _conversations
from kdcore.method.registry import Registry, installed
from kdcore.models.loading import load_model
from kdcore.runs.facts import GeneratedResponses
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.generate_data import EndpointSpec, GenerateDataSpec

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
    Raises UserError for what the user can mend (see `kdcore.runs.folder.Run.open`,
    `kdcore.models.loading`, `kdcore.data`).
    """
    registry, progress = registry or installed(), progress or Silent()
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        asked = _conversations(spec, registry)
        given = respond(asked, _answerer(spec, progress), run.path(FILE), progress)
        answers = [m for c in given.conversations for m in c.messages if m.role == "assistant"]
        run.update(
            responses=GeneratedResponses(
                conversations=len(given.conversations),
                left_out=len(asked) - len(given.conversations),
                responses=len(answers),
                ended=sum(answer.ended for answer in answers),
                tokens=given.tokens,
                seconds=given.seconds,
            )
        )
    return run


def _answerer(spec: GenerateDataSpec, progress: Progress) -> Answerer:
    if isinstance(spec.teacher, EndpointSpec):
        return EndpointAnswers(spec.teacher, spec.responses)
    with progress.stage("load the model", 1) as stage:
        model = load_model(spec.teacher)
        stage.advance()
    return ModelAnswers(model, spec.responses)
