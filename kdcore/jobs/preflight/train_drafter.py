"""Preflight of train-drafter specs: resolve everything, measure the drafter, and train nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcore.components.registry import Registry, installed
from kdcore.data.caches.hidden_states import refuse_more, refuse_other_folder
from kdcore.errors import UserError, in_field
from kdcore.jobs.preflight.advice import advice
from kdcore.jobs.preflight.distill import chosen, steps_of
from kdcore.jobs.preflight.drafter_cost import drafter_cost
from kdcore.jobs.preflight.estimates import (
    ACTIVATIONS,
    bytes_of,
    generating,
    of_chunk,
    of_trained,
    probed_rows,
    products_of,
    rows_of,
    throughput,
)
from kdcore.jobs.preflight.mistakes import raise_all
from kdcore.jobs.preflight.report import Report
from kdcore.jobs.preflight.rows import DataFacts, data_facts, example_row, first_row, sampled
from kdcore.jobs.resolution.resolved_drafter import ResolvedDrafter, origin_of
from kdcore.models.device import process_device
from kdcore.models.facts import ModelFacts, describe_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.train_drafter import TrainDrafterSpec


def preflight_drafter(spec: TrainDrafterSpec, *, registry: Registry | None = None) -> Report:
    """Resolve a train-drafter spec, and estimate the cost of its run.

    Args:
        spec: The train-drafter spec.
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


def _report(spec: TrainDrafterSpec, registry: Registry, run: Run) -> Report:
    """The findings about a spec that can run."""
    resolved = ResolvedDrafter.of(spec, registry, run, weights=False)
    method, sources = resolved.method, sampled(resolved.sources)
    target, drafter = resolved.target, resolved.drafter
    objective, streams = method.objective, method.streams
    data = {name: data_facts(source, name, spec, [target]) for name, source in sources.items()}
    facts = describe_model(target)
    classes = facts.classes if drafter.vocabulary is None else len(drafter.vocabulary)
    drafting = _Drafting(spec, drafter, target, facts, classes, data)
    terms = len(objective.weights)
    buffers = len(streams) if method.policy.owns_momentum else 0
    size = bytes_of(drafter.parameters())
    seconds = drafting.seconds(len(streams), terms)
    asked = DraftingSpec.model_validate({}).model_copy(update={"drafter": spec.drafter})
    prompt = first_row(sources["train"], spec, target.tokenizer).inputs["input_ids"].tolist()
    cost = drafter_cost(
        spec.target, target, {spec.drafter.name: asked}, prompt, process_device(), registry
    )
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
                parameters=sum(parameter.numel() for parameter in drafter.parameters()),
                context=facts.context,
            ),
        },
        classes=classes,
        train=data["train"],
        heldout=data.get("heldout"),
        example=example_row(sources["train"], spec, target.tokenizer),
        steps=steps_of(spec, data["train"]),
        memory={
            "target": target.weight_bytes,
            "drafter": size,
            **of_trained(spec.training, size, len(streams), terms, buffers),
            **drafting.memory(),
        },
        seconds=seconds,
        disk=drafting.disk(),
        warnings=advice(spec, sources, target.tokenizer, sum(seconds.values())),
        drafting=cost,
    )


@dataclass(frozen=True, slots=True)
class _Drafting:
    """A drafter and its target without values, and the statistics of the rows.

    Attributes:
        classes: Number of classes that the drafter can propose.
        data: Field of ``data`` -> statistics of the source.
    """

    spec: TrainDrafterSpec
    drafter: Any
    target: LoadedModel
    facts: ModelFacts
    classes: int
    data: Mapping[str, DataFacts]

    def memory(self) -> dict[str, int]:
        """Purpose -> bytes at the peak of a step, beside the weights and their optimizer state."""
        training, width = self.spec.training, self.facts.hidden
        positions = training.batch_size * self.data["train"].longest
        itemsize = (products_of(training) or torch.float32).itemsize
        return {
            "features": positions * (len(self.drafter.layers) + 1) * width * 4,
            # a level keeps as much as a layer of the target would
            "activations": positions * self.drafter.depth * width * ACTIVATIONS * itemsize,
            "logits of a chunk": of_chunk(training, self.classes),
        }

    def disk(self) -> dict[str, int]:
        """Purpose -> maximum of bytes: a missing response counts with its maximum length.

        Raises UserError when the folder of the hidden states has others, or when all responses
        exist and the states would exceed their limit.
        """
        asked, train = self.spec.data.hidden_states, self.data["train"]
        if asked is None:
            return {}
        origin = origin_of(asked, self.drafter, self.target)
        positions = round(train.rows * train.tokens)
        with in_field("data.hidden_states"):
            if asked.folder is not None:  # a run's own goes with it
                refuse_other_folder(asked.folder, origin)
            if not train.generated:
                refuse_more(positions, origin, asked.limit_gb)
        return {"hidden states": positions * origin.bytes_per_position}

    def seconds(self, streams: int, terms: int) -> dict[str, float]:
        """Purpose -> seconds, for a method with ``streams`` streams and ``terms`` terms."""
        spec, training, target = self.spec, self.spec.training, self.facts
        train, held = self.data["train"], self.data.get("heldout")
        choosing = self.data.get("validation", held)
        rows = min(1024, max(1, round(training.batch_size * train.tokens)))

        def speed(products: torch.dtype | None, weights: torch.dtype = torch.float32) -> float:
            return throughput(rows, target.hidden, weights, products)

        body = target.parameters - target.classes * target.hidden
        head = 2 * self.classes * target.hidden * train.learned * self.drafter.depth
        forward, drafted = 2 * body * train.tokens + head, self._operations() + head
        own, autocast = self.target.model.dtype, products_of(training)
        reading, learning = forward / speed(autocast, own), drafted / speed(autocast)
        steps = steps_of(spec, train)
        seen = rows_of(training, steps)
        chosen = steps // training.eval_every if training.eval_every else 0
        measured = sum(
            (
                (spec.evaluation.before + 1) * held.rows if held else 0,
                chosen * choosing.rows if choosing else 0,
                choosing.rows if choosing and choosing is not held else 0,
            )
        )
        stored = spec.data.hidden_states is not None  # the target reads a training row once
        answers = sum(facts.generated for facts in self.data.values())
        longest = spec.data.responses.max_new_tokens
        probed = probed_rows(training, steps)
        return {
            "responses": generating(self.target, answers * longest, speed(None, own)),
            "hidden states": train.rows * forward / speed(None, own) if stored else 0.0,
            "training": seen * (reading * (not stored) + learning * (1 + 2 * streams)),
            "probing": probed * (reading + learning * (1 + 2 * terms)),
            "measuring": measured * (forward / speed(None, own) + drafted / speed(None)),
        }

    @torch.no_grad()
    def _operations(self) -> float:
        """Operations of a forward pass over a mean row, counted because layers may be reused.

        The drafter is on the meta device, so nothing is computed.
        """
        tokens = self.data["train"].tokens
        counted = max(2, round(tokens))
        row = torch.zeros(1, counted, dtype=torch.int64, device="meta")
        width = len(self.drafter.layers) * self.facts.hidden
        with FlopCounterMode(display=False) as counter:
            self.drafter(row, torch.zeros(1, counted, width, device="meta"))
        return float(counter.get_total_flops() * tokens / counted)
