"""What training a drafter would do and cost, found out without training: see `kdcore.preflight`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcore.assembly import Assembly
from kdcore.distill import refuse_two_momenta
from kdcore.drafter_specs import TrainDrafterSpec
from kdcore.estimates import (
    ACTIVATIONS,
    DECODING,
    LOGITS,
    bytes_of,
    probe_copies,
    probed_rows,
    throughput,
)
from kdcore.models import ModelFacts, describe_model, load_model
from kdcore.objective import Objective
from kdcore.preflight import DataFacts, Report, chosen, example_row, judge, steps_of
from kdcore.protocols import MomentumPolicy
from kdcore.registry import Registry, installed
from kdcore.runs import Run
from kdcore.train_drafter import build_drafter, build_sources, refuse_reference
from kdcore.training_arguments import training_arguments
from kdcore.views import DrafterView


def preflight_drafter(spec: TrainDrafterSpec, *, registry: Registry | None = None) -> Report:
    """Resolve all that a run needs, and estimate what it costs.

    Raises UserError for the first thing that would stop the run.
    """
    registry = registry or installed()
    assembly = Assembly(registry)
    objective = Objective.build(spec.method, assembly)
    policy: MomentumPolicy = assembly.build(spec.method.momentum)
    refuse_reference(objective)
    refuse_two_momenta(spec, policy)
    run = Run(spec.run)
    run.refuse_foreign()
    training_arguments(spec, run)
    streams = policy.streams(tuple(objective.weights))
    sources = build_sources(spec, assembly)

    target = load_model(spec.target, weights=False)
    with torch.device("meta"):  # sizes without values, as the target's
        drafter: Any = build_drafter(spec, registry, target)
    DrafterView(target.model, drafter)  # refuses a target that no drafter's head can be read by

    judged = {name: judge(source, name, spec, [target]) for name, source in sources.items()}
    train, held = judged["train"], judged.get("heldout")
    choosing = judged.get("validation", held)
    facts = describe_model(target)
    classes = facts.classes if drafter.vocabulary is None else len(drafter.vocabulary)
    own = sum(parameter.numel() for parameter in drafter.parameters())
    work = _operations(drafter, target.model.config.get_text_config().hidden_size, train.tokens)
    buffers = len(streams) if policy.owns_momentum else 0
    terms = len(objective.weights)
    return Report(
        components=tuple(chosen(spec, registry)),
        terms=objective.weights,
        streams=streams,
        models={
            "target": facts,
            "drafter": ModelFacts(
                name=f"{spec.drafter.name}, reads hidden states {list(drafter.layers)}",
                architecture=type(drafter).__name__,
                classes=classes,
                hidden=facts.hidden,
                layers=drafter.depth,
                parameters=own,
                context=facts.context,
            ),
        },
        classes=classes,
        train=train,
        heldout=held,
        example=example_row(sources["train"], spec, target.tokenizer),
        steps=steps_of(spec, train),
        memory=_memory(spec, target, drafter, train, classes, buffers, terms),
        seconds=_seconds(
            spec, facts, drafter, work, train, held, choosing, classes, len(streams), terms
        ),
    )


def _memory(
    spec: TrainDrafterSpec,
    target: Any,
    drafter: Any,
    train: DataFacts,
    classes: int,
    buffers: int,
    terms: int,
) -> dict[str, int]:
    """What for -> bytes, at the peak of a step."""
    training = spec.training
    width = target.model.config.get_text_config().hidden_size
    trained = bytes_of(drafter.parameters())
    positions = training.batch_size * train.longest
    momenta = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    read = positions * (len(drafter.layers) + 1) * width * 4
    return {
        "target": bytes_of(target.model.parameters()),
        "drafter": trained,
        "gradients": trained,
        "probing": trained * (probe_copies(terms) if training.probe_every else 0),
        "optimizer": trained * momenta,
        "momentum policy": trained * buffers,
        "features": read,
        # a level keeps what a layer of the target would
        "activations": positions * drafter.depth * width * ACTIVATIONS * 4,
        "logits of a chunk": training.chunk * classes * 4 * LOGITS,
    }


@torch.no_grad()
def _operations(drafter: Any, hidden: int, tokens: float) -> float:
    """Of a forward pass over a row: counted, since a drafter may use a layer more than once.

    drafter: on the meta device, so that nothing is computed. tokens: of a row, a mean.
    """
    counted = max(2, round(tokens))
    row = torch.zeros(1, counted, dtype=torch.int64, device="meta")
    features = torch.zeros(1, counted, len(drafter.layers) * hidden, device="meta")
    with FlopCounterMode(display=False) as counter:
        drafter(row, features)
    return float(counter.get_total_flops() * tokens / counted)


def _seconds(
    spec: TrainDrafterSpec,
    target: ModelFacts,
    drafter: Any,
    work: float,
    train: DataFacts,
    held: DataFacts | None,
    choosing: DataFacts | None,
    classes: int,
    streams: int,
    terms: int,
) -> dict[str, float]:
    """What for -> seconds; work: `_operations` of a row."""
    training = spec.training
    rows = min(1024, max(1, round(training.batch_size * train.tokens)))
    speed = throughput(rows, target.hidden, torch.float32)
    body = target.parameters - target.classes * target.hidden
    head = 2 * classes * target.hidden * train.learned * drafter.depth
    forward = 2 * body * train.tokens + head
    drafted = work + head
    steps = steps_of(spec, train)
    seen = steps * training.batch_size * training.accumulation
    chosen = steps // training.eval_every if training.eval_every else 0
    measured = sum(
        (
            (spec.evaluation.before + 1) * held.rows if held else 0,
            chosen * choosing.rows if choosing else 0,
            choosing.rows if choosing and choosing is not held else 0,
        )
    )
    runs = train.rows if spec.data.hidden_states else seen  # of the target over a training row
    sources = {id(facts): facts for facts in (train, held, choosing) if facts}
    answers = sum(facts.generated for facts in sources.values()) * (
        spec.data.responses.max_new_tokens
    )
    probed = probed_rows(training, steps)
    return {
        "responses": 2 * target.parameters * answers / (speed * DECODING),
        "training": (runs * forward + seen * drafted * (1 + 2 * streams)) / speed,
        "probing": probed * (forward + drafted * (1 + 2 * terms)) / speed,
        "measuring": measured * (forward + drafted) / speed,
    }
