"""The evaluate job: measure a model on held-out rows, with or without a teacher, and by lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoModelForCausalLM

from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation
from kdcore.data.responses.model import engine_for
from kdcore.data.rows import RowDataset, encode_rows, padding, refuse_long_rows
from kdcore.decoding.engines.protocols import Engine
from kdcore.errors import UserError, in_field
from kdcore.evaluation.answers import answers, judged, question
from kdcore.evaluation.heldout import HeldOut
from kdcore.evaluation.lm_eval import refuse_without_harness, run_tasks
from kdcore.evaluation.scores import Scores
from kdcore.models.assembly import Assembly
from kdcore.models.device import chosen_device, chunk_on
from kdcore.models.fit.pair import model_kind, refuse_other_labels, shared_vocabulary
from kdcore.models.loading.load import load_model, set_padding
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import Measured, Metric, shown
from kdcore.runs.today import pinned, today
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.parts.training import EvaluationSpec
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.views import StudentView


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        model: The model's name and digest.
        teacher: The teacher's name and digest, or None.
        figures: Figure -> mean over the held-out rows.
        metrics: Title and format of the figures that have them.
        rows: The figures by held-out row, or None without rows.
        samples: Prompts with each model's answer.
        lm_eval: Task -> metric -> value, as lm-eval reports them.
    """

    model: Mapping[str, str]
    teacher: Mapping[str, str] | None
    figures: Mapping[str, float]
    metrics: list[Metric]
    rows: Measured | None
    samples: list[dict[str, str]]
    lm_eval: Mapping[str, Mapping[str, float]]


def evaluate(
    spec: EvaluateSpec, *, registry: Registry | None = None, progress: Progress | None = None
) -> Evaluation:
    """Measure a model by an evaluate spec.

    The teacher's tokenizer encodes the rows; without a teacher, the model's own.

    Args:
        spec: The evaluate spec.
        registry: The components that the spec may name (default: the installed ones).
        progress: The display of stages and notes (default: none).

    Returns:
        The figures, by row and as means.

    Raises:
        UserError: The models or the data cannot be used (see `kdcore.models.loading.load`,
            `kdcore.data`), an answer cannot be scored, the two vocabularies differ, or the spec
            names tasks and lm-eval is not installed.
    """
    with pinned(spec.date or str(today().date())):
        return _evaluation(spec, registry or installed(), progress or Silent())


def _evaluation(spec: EvaluateSpec, registry: Registry, progress: Progress) -> Evaluation:
    assembly = Assembly(registry)
    with in_field("heldout"):
        source = assembly.build(spec.heldout) if spec.heldout else None
        examples = source.read() if source else []
    scores = Scores.build(spec.evaluation.answers, assembly.build, examples)
    if spec.lm_eval:
        refuse_without_harness()
    model, teacher = _models(spec, model_kind(source) if source else AutoModelForCausalLM, progress)
    if source is not None:
        refuse_other_labels(model, source)

    measured: Measured | None = None
    samples: list[dict[str, str]] = []
    if source is not None:
        asked = replace(model, tokenizer=(teacher or model).tokenizer)
        scores = scores.read_by(asked.tokenizer)
        with in_field("heldout"):
            rows, _ = encode_rows(source, asked.tokenizer, spec.max_length, progress)
            refuse_long_rows(rows, [asked, teacher] if teacher else [asked])
        measured = _measured(spec, RowDataset(rows), asked, teacher, progress)
        engine = _engine(spec, examples, asked, registry, progress)
        found = judged(scores, asked, spec.evaluation, progress, engine)
        measured = replace(measured, scores=found)
        samples = _samples(spec, examples, asked, engine, teacher, progress)
    figures = measured.means() if measured else {}
    return Evaluation(
        model=_named(model),
        teacher=_named(teacher) if teacher else None,
        figures=figures,
        metrics=[*shown(figures), *scores.metrics],
        rows=measured,
        samples=samples,
        lm_eval=run_tasks(model, spec.lm_eval, spec.evaluation.batch_size) if spec.lm_eval else {},
    )


def spec_of(run: Run) -> dict[str, Any]:
    """Return the evaluate spec that measures a run's student as the run did.

    Args:
        run: The run of a distill spec.

    Returns:
        The spec as plain data.

    Raises:
        UserError: The run is of another job, or has not saved its student yet.
    """
    asked = run.spec()
    if asked["job"] != "distill":
        raise UserError(
            f"{run.folder} is a run of {asked['job']}, and only a run of distill has a student",
            "name a run of distill; those of a comparison are in its folder cells",
        )
    if not run.path("model", "config.json").exists():
        raise UserError(
            f"{run.folder} does not contain a trained student",
            "finish the run: run its spec again with resume=True",
        )
    # The user must trust the teacher's code again: the run's consent does not carry over.
    teacher = asked["teacher"] and asked["teacher"] | {"trust_remote_code": False}
    data, measured = asked["data"], asked["evaluation"]
    heldout = data["heldout"]
    if heldout is not None and data["responses"]["by"] == "teacher":
        kept = {"keep": heldout["keep"]} if heldout.get("keep") else {}
        heldout = {"name": "chat", "path": str(run.path("data", "heldout.jsonl")), **kept}
    return {
        "job": "evaluate",
        "model": {"model": str(run.path("model"))},
        "teacher": teacher if heldout else None,
        "heldout": heldout,
        "max_length": data["max_length"],
        "date": run.facts.date,
        "evaluation": {n: each for n, each in measured.items() if n in EvaluationSpec.model_fields},
    }


def _models(
    spec: EvaluateSpec, kind: Any, progress: Progress
) -> tuple[LoadedModel, LoadedModel | None]:
    device = chosen_device(spec.device)
    progress.note(f"device: {device}")
    teacher: LoadedModel | None = None
    with progress.stage("load models", 2 if spec.teacher else 1) as stage:
        with in_field("model"):
            model = load_model(spec.model, kind=kind, device=device)
        stage.advance()
        if spec.teacher:
            with in_field("teacher"):
                teacher = load_model(spec.teacher, kind=kind, device=device)
            set_padding(model.model, teacher.tokenizer)
            stage.advance()
    return model, teacher


def _measured(
    spec: EvaluateSpec,
    rows: RowDataset,
    model: LoadedModel,
    teacher: LoadedModel | None,
    progress: Progress,
) -> Measured:
    with in_field("model"):
        shared_vocabulary(teacher or model, model)  # refuses other tokens or labels
    chunk = chunk_on(model.model.device, spec.chunk, model.classes)
    heldout = HeldOut(
        rows, padding(model.tokenizer), spec.evaluation.batch_size, chunk, 0, progress
    )
    live = LiveTeacher.of(teacher.model, model.classes) if teacher else None
    view = StudentView(model.model, model.classes, live)
    return heldout.measure(view, model.model, {})


def _engine(
    spec: EvaluateSpec,
    examples: Sequence[Any],
    model: LoadedModel,
    registry: Registry,
    progress: Progress,
) -> Engine | None:
    """The engine of the model's answers; None for a classifier or the model itself."""
    if not any(isinstance(each, Conversation) for each in examples):
        return None
    scored, asked = len(examples) if spec.evaluation.answers else 0, spec.evaluation
    tokens = scored * asked.answer_tokens + asked.samples * asked.sample_tokens
    return engine_for(model, spec.engine, tokens, registry, progress.note)


def _samples(
    spec: EvaluateSpec,
    examples: Any,
    model: LoadedModel,
    engine: Engine | None,
    teacher: LoadedModel | None,
    progress: Progress,
) -> list[dict[str, str]]:
    """The first prompts with each model's answer; too few for an engine of the teacher."""
    prompts = [e for e in examples if isinstance(e, Conversation)][: spec.evaluation.samples]
    said = {
        who: answers(
            prompts,
            loaded,
            progress,
            f"the {who}'s samples",
            batch_size=spec.evaluation.batch_size,
            max_new_tokens=spec.evaluation.sample_tokens,
            engine=runs,
        )
        for who, loaded, runs in (("model", model, engine), ("teacher", teacher, None))
        if loaded is not None
    }
    return [
        {"prompt": question(prompt)} | {who: each[place] for who, each in said.items()}
        for place, prompt in enumerate(prompts)
    ]


def _named(loaded: LoadedModel) -> dict[str, str]:
    return {"name": loaded.name, "digest": loaded.digest}
