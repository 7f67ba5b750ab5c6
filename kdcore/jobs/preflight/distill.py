"""Preflight of distill and compare specs: resolve everything and train nothing.

Models are built without weights, components are built in full, and a sample of the data is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcore.components.choice import choices
from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.file import questions_of
from kdcore.errors import UserError
from kdcore.jobs.preflight import estimates
from kdcore.jobs.preflight.advice import advice
from kdcore.jobs.preflight.mistakes import raise_all
from kdcore.jobs.resolved import ResolvedDistill
from kdcore.method.protocols import DataSource
from kdcore.method.records import Row
from kdcore.method.schedule import Points
from kdcore.models.anatomy import context_of
from kdcore.models.facts import (
    ModelFacts,
    describe_model,
    positions_of,
    refuse_longer,
    token_texts,
)
from kdcore.models.loaded import LoadedModel
from kdcore.runs.comparison_results import refuse_unmeasured
from kdcore.runs.folder import Run
from kdcore.runs.today import pinned
from kdcore.specs.compare import CompareSpec, changed, nested
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import micro_batches

SAMPLE = 256
"""Maximum number of rows that are encoded per source; they stand for the others."""

_UNCUT = 2**31 - 1

STAND_IN = Message("assistant", "(the teacher's response)")
"""Placeholder for a response that is not generated yet."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Statistics of a source's rows, estimated from a sample.

    Attributes:
        rows: Number of rows.
        sampled: Number of rows that were encoded.
        tokens: Mean number of positions of a row after truncation.
        learned: Mean number of learned positions of a row after truncation.
        longest: Maximum number of positions of a row.
        cut: Share of rows that are longer than ``data.max_length``.
        empty: Share of rows without a learned token; training skips them.
        generated: Number of responses that the teacher must still generate; each counts with its
            maximum length.
        notes: Note about rows of the sample -> the id of the first such row.
    """

    rows: int
    sampled: int
    tokens: float
    learned: float
    longest: int
    cut: float
    empty: float
    generated: int
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The findings of `preflight`.

    Attributes:
        components: Kind, name and distribution with version of each chosen component.
        terms: Term of the loss -> scheduled weight.
        streams: Stream -> the terms that share a backward pass.
        models: Role, e.g. teacher or student -> facts of the model.
        classes: V, the number of classes that the loss compares.
        train: The training rows.
        heldout: The held-out rows, or None.
        example: The first row's tokens, each with whether it is learned.
        steps: Optimizer steps of the run.
        memory: Purpose -> bytes.
        seconds: Purpose -> seconds; see `kdcore.jobs.preflight.estimates`.
        disk: Purpose -> maximum of bytes, beside the run's own files.
        teacher_cache: The folder of the teacher cache that training reads, or None.
        aligned: Whether teacher and student read their own tokens of the same text.
        served_teacher: The name and the servers of a served teacher, or None.
        warnings: What the spec allows but is probably a mistake.
        adapted: Parameters that LoRA trains; None for a student without adapters.
    """

    components: tuple[tuple[str, str, str], ...]
    terms: Mapping[str, float | Points]
    streams: Mapping[str, tuple[str, ...]]
    models: Mapping[str, ModelFacts]
    classes: int
    train: DataFacts
    heldout: DataFacts | None
    example: tuple[tuple[str, bool], ...]
    steps: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    disk: Mapping[str, int] = field(default_factory=dict)
    teacher_cache: Path | None = None
    aligned: bool = False
    served_teacher: str | None = None
    warnings: tuple[str, ...] = ()
    adapted: int | None = None


@pinned("")
def preflight(spec: DistillSpec, *, registry: Registry | None = None) -> Report:
    """Resolve a distill spec, and estimate the cost of its run.

    Args:
        spec: The distill spec.
        registry: The components that the spec may name (default: the installed ones).

    Returns:
        The findings.

    Raises:
        Mistakes: The run could not start; the message states all reasons.
    """
    registry = registry or installed()
    run = Run(spec.run)
    run.refuse_foreign()
    try:
        return _report(spec, registry, run)
    except UserError as first:
        raise_all(first, spec, registry, run, judge)


def _report(spec: DistillSpec, registry: Registry, run: Run) -> Report:
    """The findings about a spec that can run."""
    resolved = ResolvedDistill.of(spec, registry, run, weights=False)
    if (served := resolved.served()) is not None:  # refuses a method; it sends no request
        served.close()
    method, models, sources = resolved.method, resolved.models, resolved.sources
    objective, streams = method.objective, method.streams
    tokenizer = models.first.tokenizer
    train = judge(sources["train"], "train", spec, resolved.readers)
    if models.aligned:  # refuses a row that is too long for the teacher
        judge(sources["train"], "train", spec, [models.answerer])
    heldout = None
    if "heldout" in sources:
        heldout = judge(sources["heldout"], "heldout", spec, resolved.readers)
    if "validation" in sources:
        judge(sources["validation"], "validation", spec, resolved.readers)
    steps, asked = steps_of(spec, train), spec.data.on_policy
    longer = asked.max_new_tokens if asked else 0
    often = asked.probability * estimates.rows_of(spec.training, steps) if asked else 0.0
    work = estimates.Work(
        steps=steps,
        streams=len(streams),
        terms=len(objective.weights),
        tokens=train.tokens,
        learned=train.learned,
        longest=min(spec.data.max_length, train.longest + longer),
        heldout=heldout.rows if heldout else 0,
        generated=(train.generated + (heldout.generated if heldout else 0))
        * spec.data.responses.max_new_tokens,
        sampled=longer * often,
        inputs=_first_row(sources["train"], spec, tokenizer).inputs,
    )
    buffers = len(streams) if method.policy.owns_momentum else 0
    seconds = estimates.seconds(spec, models, work)
    trained = [p.numel() for p in models.student.model.parameters() if p.requires_grad]
    return Report(
        components=tuple(chosen(spec, registry)),
        terms=objective.weights,
        streams=streams,
        models={name: describe_model(model) for name, model in models.named.items()},
        classes=models.classes,
        train=train,
        heldout=heldout,
        example=example_row(sources["train"], spec, tokenizer),
        steps=work.steps,
        memory=estimates.memory(spec, models, work, buffers),
        seconds=seconds,
        teacher_cache=spec.data.teacher_cache,
        served_teacher=_servers(spec),
        aligned=models.aligned,
        warnings=advice(
            spec, sources, tokenizer, sum(seconds.values()), models.student.model.dtype
        ),
        adapted=sum(trained) if spec.student.lora else None,
    )


def _servers(spec: DistillSpec) -> str | None:
    served = spec.served_teacher
    if served is None:
        return None
    return (
        f"the top {served.k} of {served.model} at {', '.join([served.endpoint, *served.replicas])}"
    )


def preflight_arms(spec: CompareSpec, *, registry: Registry | None = None) -> dict[str, Any]:
    """Resolve each arm of a comparison, and estimate the cost of one seed.

    Args:
        spec: The compare spec.
        registry: The components that the spec may name (default: the installed ones).

    Returns:
        Arm -> findings of its job's preflight, a `Report` for kdcore's own jobs; empty for a job
        without a preflight. Controls cost as much as their arm.

    Raises:
        UserError: An arm could not start; the message begins with its name.
    """
    registry = registry or installed()
    Run(spec.run).refuse_foreign()
    refuse_unmeasured("choose_by", spec.choose_by, spec.base.job)
    job, point = registry.job(spec.base.job), nested(spec.points[0])
    reports: dict[str, Any] = {}
    if job.preflight is None:
        return reports
    for arm, changes in spec.arms.items():
        try:
            reports[arm] = job.look_ahead(
                changed(changed(spec.base, changes), point), registry=registry
            )
        except UserError as wrong:
            raise UserError(f"arm '{arm}': {wrong.cause}", wrong.cure) from wrong
    if spec.validation:
        try:
            tried = changed(spec.base, {"data": {"heldout": spec.validation.dump()}})
            job.look_ahead(tried, registry=registry)
        except UserError as wrong:
            raise UserError(f"validation: {wrong.cause}", wrong.cure) from wrong
    return reports


def judge(
    source: DataSource, name: str, spec: TrainedSpec, models: Sequence[LoadedModel]
) -> DataFacts:
    """Estimate a source's statistics from evenly spread rows and from its longest one.

    Args:
        source: The data source.
        name: The source's field in ``data``.
        spec: The spec.
        models: The models that read the rows; the first one's tokenizer encodes them.

    Returns:
        The statistics.

    Raises:
        UserError: The source is empty, has no learned positions, or has a row that is too long
            for a model.
    """
    examples, limit = source.read(), spec.data.max_length
    if not len(examples):
        raise UserError(f"data.{name} is empty", "choose a source with at least one row")
    places = range(0, len(examples), -(-len(examples) // SAMPLE))
    notes: dict[str, str] = {}
    judged = [_judged(source, examples[place], spec, models, notes) for place in places]
    longest = max(range(len(examples)), key=lambda place: _characters(examples[place]))
    most = _judged(source, examples[longest], spec, models, notes)
    sizes, learned, awaited = zip(*judged, strict=True)
    count = len(places)
    if not any(learned) and count == len(examples):
        raise UserError(
            f"none of the {count} rows of data.{name} has a response within {limit} tokens",
            "raise data.max_length, or choose rows that have responses",
        )
    return DataFacts(
        rows=len(examples),
        sampled=count,
        tokens=sum(min(size, limit) for size in sizes) / count,
        learned=sum(learned) / count,
        longest=min(max(*sizes, most[0]), limit),
        cut=sum(size > limit for size in sizes) / count,
        empty=sum(not teaches for teaches in learned) / count,
        generated=round(sum(awaited) * len(examples) / count),
        notes=notes,
    )


def _judged(
    source: DataSource,
    example: Any,
    spec: TrainedSpec,
    models: Sequence[LoadedModel],
    notes: dict[str, str],
) -> tuple[int, int, int]:
    """An example's positions before truncation, learned positions after it, and missing responses.

    The notes about its row are added to ``notes``.

    Raises UserError when the truncated row is too long for a model.
    """
    limit = spec.data.max_length
    example, answers = _with_stand_ins(example, spec)
    row = source.encode(example, models[0].tokenizer, _UNCUT)
    for note in row.notes:
        notes.setdefault(note, row.id)
    size, teaches = positions_of(row), int(row.mask[:limit].sum())
    readers = models
    if answers:  # at their maximum length; the first model skips a row that it cannot answer
        longer = answers * spec.data.responses.max_new_tokens - int(row.mask.sum())
        size, teaches = size + longer, int(row.mask.sum()) + longer
        teaches = max(0, teaches - max(0, size - limit))
        fits = size <= (context_of(models[0].model) or size)
        readers = models[1:] if fits else ()
    if teaches:  # otherwise training skips the row
        refuse_longer(row.id, min(size, limit), readers)
    return size, teaches, answers


def _characters(example: Any) -> int:
    """The number of characters of a conversation; 0 for other examples."""
    messages = example.messages if isinstance(example, Conversation) else ()
    return sum(len(message.content) for message in messages)


def _with_stand_ins(example: Any, spec: TrainedSpec) -> tuple[Any, int]:
    """An example with placeholders for missing responses, and the number of placeholders."""
    if spec.data.responses.by == "dataset" or not isinstance(example, Conversation):
        return example, 0
    answers, conversation = 0, questions_of(example)
    while conversation.needs_response:
        answers, conversation = answers + 1, conversation.answered(STAND_IN)
    return conversation, answers


def example_row(
    source: DataSource, spec: TrainedSpec, tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """Decode the tokens of the first row as the model reads them.

    Args:
        source: The data source.
        spec: The spec.
        tokenizer: The tokenizer that encodes the rows.

    Returns:
        Each token with whether it is learned; empty for rows that do not predict tokens.
    """
    row = _first_row(source, spec, tokenizer)
    if len(row.labels) != len(row.inputs.get("input_ids", ())):
        return ()
    ids = [int(row.inputs["input_ids"][0]), *row.labels.tolist()]
    return tuple(zip(token_texts(tokenizer, ids), [False, *row.mask.tolist()], strict=True))


def _first_row(source: DataSource, spec: TrainedSpec, tokenizer: Any) -> Row:
    example, _ = _with_stand_ins(source.read()[0], spec)
    return source.encode(example, tokenizer, spec.data.max_length)


def steps_of(spec: TrainedSpec, train: DataFacts) -> int:
    """Count the optimizer steps of the whole run.

    Args:
        spec: The spec.
        train: The statistics of the training rows.

    Returns:
        The number of steps.

    Raises:
        UserError: The run would make no step.
    """
    training = spec.training
    rows = max(1, round(train.rows * (1 - train.empty)))
    batches = micro_batches(spec, rows)
    return training.steps or math.ceil(training.epochs * math.ceil(batches / training.accumulation))


def chosen(spec: TrainedSpec, registry: Registry) -> Iterator[tuple[str, str, str]]:
    """Yield every component of a spec, including those inside other components' params.

    Args:
        spec: The spec.
        registry: The components that the spec may name.

    Yields:
        Kind, name and distribution; the kind is followed by the field where their names differ.
    """
    for place, choice in choices(spec):
        plugin = registry.plugin_of(choice.kind, choice.name)
        kind = choice.kind if choice.kind in place else f"{choice.kind} ({place})"
        yield kind, choice.name, f"{plugin.distribution} {plugin.version}"
