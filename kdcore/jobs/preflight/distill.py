"""Preflight of distill specs: resolve everything and train nothing.

Models are built without weights, components are built in full, and a sample of the data is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from kdcore.components.choice import choices
from kdcore.components.registry import Registry, installed
from kdcore.data.alignment.prompted_rows import PromptedSource
from kdcore.errors import UserError
from kdcore.jobs.preflight import estimates
from kdcore.jobs.preflight.advice import advice, low_layers
from kdcore.jobs.preflight.mistakes import raise_all
from kdcore.jobs.preflight.report import Report
from kdcore.jobs.preflight.rows import DataFacts, data_facts, example_row, first_row, sampled
from kdcore.jobs.preflight.teachers import teachers_of
from kdcore.jobs.resolution.images import image_warnings, refuse_other_patches
from kdcore.jobs.resolution.resolved import ResolvedDistill
from kdcore.jobs.resolution.teaching import refuse_long_prompts
from kdcore.models.facts import describe_model
from kdcore.runs.folder import Run
from kdcore.runs.today import pinned
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import origin_of
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import micro_batches
from kdcore.training.trainer.matching import matched_lines


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
    run = Run(spec.run, planned=True)
    run.refuse_foreign()
    try:
        return _report(spec, registry, run)
    except UserError as first:
        raise_all(first, spec, registry, run, data_facts)


def _report(spec: DistillSpec, registry: Registry, run: Run) -> Report:
    """The findings about a spec that can run."""
    resolved = ResolvedDistill.of(spec, registry, run, weights=False)
    resolved = replace(resolved, sources=sampled(resolved.sources))
    with ExitStack() as connections:  # both may refuse, and send no request
        servers = bool(resolved.served(connections))
        if (sampler := resolved.sampler(run)) is not None:
            servers = True
            connections.callback(sampler.close)
    method, models, sources = resolved.method, resolved.models, resolved.sources
    objective, streams = method.objective, method.streams
    tokenizer = models.first.tokenizer
    source = sources["train"] if models.aligned else resolved.train_source
    train = data_facts(source, "train", spec, resolved.readers)
    if isinstance(source, PromptedSource):
        refuse_long_prompts(source.found.values(), models.answerer, spec)
    if models.aligned:  # refuses a row that is too long for the teacher
        data_facts(sources["train"], "train", spec, [models.answerer])
    heldout = None
    if "heldout" in sources:
        heldout = data_facts(sources["heldout"], "heldout", spec, resolved.readers)
    if "validation" in sources:
        data_facts(sources["validation"], "validation", spec, resolved.readers)
    beside = None
    if "auxiliary" in sources:
        beside = data_facts(sources["auxiliary"], "auxiliary", spec, resolved.readers)
    steps, asked = steps_of(spec, train), spec.data.on_policy
    longer = asked.max_new_tokens if asked else 0
    often = asked.probability * estimates.rows_of(spec.training, steps) if asked else 0.0
    together = train.padding.rows if spec.training.packing else 1.0
    longest = spec.data.max_length if spec.training.packing else train.longest + longer
    work = estimates.Work(
        steps=steps,
        streams=len(streams),
        terms=len(objective.weights),
        tokens=train.tokens * together,
        learned=train.learned * together,
        longest=min(spec.data.max_length, longest),
        heldout=round(heldout.rows / together) if heldout else 0,
        answered=heldout.rows * spec.evaluation.answer_tokens
        if heldout and spec.evaluation.answers
        else 0,
        generated=(train.generated + (heldout.generated if heldout else 0))
        * spec.data.responses.max_new_tokens,
        sampled=longer * often,
        inputs=first_row(sources["train"], spec, tokenizer).inputs,
        beside=_share(spec, train, beside),
    )
    buffers = len(streams) if method.policy.owns_momentum else 0
    matchers = objective.matchers.values()
    seconds = estimates.seconds(spec, models, work, matchers)
    if matchers:
        refuse_other_patches(models, work.inputs)
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
        memory=estimates.memory(spec, models, work, buffers, matchers),
        seconds=seconds,
        teacher_cache=spec.data.teacher_cache,
        served_teacher=origin_of(spec.served_teacher) if spec.served_teacher else None,
        sampler=asked.sampler.described if asked and asked.sampler else None,
        aligned=models.aligned,
        warnings=(
            *advice(spec, sources, tokenizer, sum(seconds.values()), models.student.model.dtype),
            *filter(None, [low_layers(spec, models.student.cut_from)]),
            *image_warnings(spec, sources),
        ),
        adapted=sum(trained) if spec.student.lora else None,
        teachers=teachers_of(spec, sources["train"].read()) if spec.teachers else (),
        servers=servers,
        auxiliary=beside,
        auxiliary_terms=method.auxiliary.weights if method.auxiliary else {},
        matched=tuple(matched_lines(objective)),
    )


def _share(spec: DistillSpec, train: DataFacts, beside: DataFacts | None) -> float:
    """The positions of auxiliary rows that a step reads, for each position of a training row."""
    asked, of_train = spec.data.auxiliary, spec.training.batch_size * train.tokens
    if asked is None or beside is None or not of_train:
        return 0.0
    return (asked.batch_size or spec.training.batch_size) * beside.tokens / of_train


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
    together = train.padding.rows if training.packing else 1.0
    items = max(1, round(train.rows * (1 - train.empty) / together))
    batches = micro_batches(spec, items)
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
