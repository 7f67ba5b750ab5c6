"""What a spec would do, found out without training: everything is resolved, nothing is learned.

Models are built without their weights, components for real, and a sample of the data is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError
from kdcore.jobs.preflight import estimates
from kdcore.jobs.resolved import ResolvedDistill
from kdcore.method.choice import choices
from kdcore.method.protocols import DataSource
from kdcore.method.records import Row
from kdcore.method.registry import Registry, installed
from kdcore.method.schedule import Points
from kdcore.models.anatomy import context_of
from kdcore.models.facts import ModelFacts, describe_model, positions_of, refuse_longer
from kdcore.models.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.specs.compare import CompareSpec, changed, nested
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import micro_batches

SAMPLE = 256
"""How many rows of a source are encoded; the others are taken to be like them."""

_UNCUT = 2**31 - 1

STAND_IN = Message("assistant", "(the answer will stand here)")
"""Takes the place of a response that is yet to be generated."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the rows of a source are like, judged by a sample.

    rows, sampled: how many there are, and how many were encoded. tokens, learned: mean positions
    of a row after the cut, and how many of them are learned. longest: most positions of a row.
    cut: share of rows that are longer than ``data.max_length``. empty: share without a learned
    token, which are left out. generated: responses that the teacher is yet to give; each then
    counts with its longest length.
    """

    rows: int
    sampled: int
    tokens: float
    learned: float
    longest: int
    cut: float
    empty: float
    generated: int


@dataclass(frozen=True, slots=True)
class Report:
    """What `preflight` found.

    Attributes:
        components: Kind, name, and distribution with version, of all that the spec chose.
        terms: Name -> scheduled weight.
        streams: Name -> the terms that share a backward pass.
        models: By role, e.g. teacher and student.
        classes: V, how many classes the loss compares.
        train: The rows to train on.
        heldout: The held-out rows, or None.
        example: The first row's tokens, each with whether it is learned.
        steps: Optimiser steps of the run.
        memory: What for -> bytes.
        seconds: What for -> seconds; see `kdcore.jobs.preflight.estimates`.
        disk: What for -> bytes at most, beside the run's own files.
        teacher_cache: The folder that training reads the teacher's logits from, or None.
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


def preflight(spec: DistillSpec, *, registry: Registry | None = None) -> Report:
    """Resolve all that a run needs, and estimate what it costs.

    Raises UserError for the first thing that would stop the run.
    """
    registry = registry or installed()
    run = Run(spec.run)
    run.refuse_foreign()
    resolved = ResolvedDistill.of(spec, registry, run, weights=False)
    method, models, sources = resolved.method, resolved.models, resolved.sources
    objective, streams = method.objective, method.streams
    tokenizer = models.first.tokenizer
    train = judge(sources["train"], "train", spec, resolved.readers)
    heldout = None
    if "heldout" in sources:
        heldout = judge(sources["heldout"], "heldout", spec, resolved.readers)
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
        seconds=estimates.seconds(spec, models, work),
        teacher_cache=spec.data.teacher_cache,
    )


def preflight_arms(spec: CompareSpec, *, registry: Registry | None = None) -> dict[str, Any]:
    """What each arm of a comparison would do with one seed; controls are like their arm.

    Returns:
        Arm -> the report of its job's preflight, a `Report` for kdcore's own jobs; empty for a job
        that has no preflight.

    Raises:
        UserError: An arm would not run; the first one, by its name.
    """
    registry = registry or installed()
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
    """Judge a source by rows from all over it, and by the one that looks longest.

    models: as `kdcore.training.rows.read_rows` takes them.
    Raises UserError when it has no rows, or none that teaches, or one that a model cannot read.
    """
    examples, limit = source.read(), spec.data.max_length
    if not len(examples):
        raise UserError(f"data.{name} has no rows", "name a source that has some")
    places = range(0, len(examples), -(-len(examples) // SAMPLE))
    judged = [_judged(source, examples[place], spec, models) for place in places]
    longest = max(range(len(examples)), key=lambda place: _characters(examples[place]))
    most = _judged(source, examples[longest], spec, models)
    sizes, learned, awaited = zip(*judged, strict=True)
    count = len(places)
    if not any(learned) and count == len(examples):
        raise UserError(
            f"none of the {count} rows of data.{name} has a response within {limit} tokens",
            "raise data.max_length, or give rows that have responses",
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
    )


def _judged(
    source: DataSource, example: Any, spec: TrainedSpec, models: Sequence[LoadedModel]
) -> tuple[int, int, int]:
    """An example's positions before the cut, those learned after it, and responses awaited.

    Raises UserError when a model cannot read what is left after the cut.
    """
    limit = spec.data.max_length
    example, answers = _with_stand_ins(example, spec)
    row = source.encode(example, models[0].tokenizer, _UNCUT)
    size, teaches = positions_of(row), int(row.mask[:limit].sum())
    readers = models
    if answers:  # as long as they may become, and the first model leaves out what it cannot answer
        longer = answers * spec.data.responses.max_new_tokens - int(row.mask.sum())
        size, teaches = size + longer, int(row.mask.sum()) + longer
        teaches = max(0, teaches - max(0, size - limit))
        fits = size <= (context_of(models[0].model) or size)
        readers = models[1:] if fits else ()
    if teaches:  # else it is left out
        refuse_longer(row.id, min(size, limit), readers)
    return size, teaches, answers


def _characters(example: Any) -> int:
    """How long a conversation looks; others are not known to be text."""
    messages = example.messages if isinstance(example, Conversation) else ()
    return sum(len(message.content) for message in messages)


def _with_stand_ins(example: Any, spec: TrainedSpec) -> tuple[Any, int]:
    """An example that can be encoded, and how many responses in it the teacher is yet to give."""
    if spec.data.responses.by == "dataset" or not isinstance(example, Conversation):
        return example, 0
    answers, conversation = 0, example.questions()
    while conversation.needs_response:
        answers, conversation = answers + 1, conversation.answered(STAND_IN)
    return conversation, answers


def example_row(
    source: DataSource, spec: TrainedSpec, tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """The tokens of the first row as a model sees them; none where no tokens are predicted."""
    row = _first_row(source, spec, tokenizer)
    if len(row.labels) != len(row.inputs.get("input_ids", ())):
        return ()
    ids = [int(row.inputs["input_ids"][0]), *row.labels.tolist()]
    return tuple(zip(map(tokenizer.decode, ids), [False, *row.mask.tolist()], strict=True))


def _first_row(source: DataSource, spec: TrainedSpec, tokenizer: Any) -> Row:
    example, _ = _with_stand_ins(source.read()[0], spec)
    return source.encode(example, tokenizer, spec.data.max_length)


def steps_of(spec: TrainedSpec, train: DataFacts) -> int:
    """Optimiser steps of the whole run. Raises UserError when none would be made."""
    training = spec.training
    rows = max(1, round(train.rows * (1 - train.empty)))
    batches = micro_batches(spec, rows)
    return training.steps or math.ceil(training.epochs * math.ceil(batches / training.accumulation))


def chosen(spec: TrainedSpec, registry: Registry) -> Iterator[tuple[str, str, str]]:
    """Every component named in a spec, those inside other components' params included.

    Yields kind, name and distribution; beside a kind the field, where that is not named for it.
    """
    for place, choice in choices(spec):
        plugin = registry.plugin_of(choice.kind, choice.name)
        kind = choice.kind if choice.kind in place else f"{choice.kind} ({place})"
        yield kind, choice.name, f"{plugin.distribution} {plugin.version}"
