"""Does a drafter pay here? The cost of its rounds, measured before it is trained or benchmarked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.decoding.build import REFERENCE, build_decoder, engine_choice
from kdcore.decoding.engines.protocols import ConvertingEngine
from kdcore.decoding.loop import Decoder
from kdcore.errors import UserError, in_field
from kdcore.evaluation.speed.break_even import TOKENS, BreakEven, break_even
from kdcore.models.anatomy import context_of
from kdcore.models.assembly import Assembly
from kdcore.models.device import available_memory, machine
from kdcore.models.folder.weights import are_here
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.costs import in_bytes
from kdcore.specs.parts.decoding import DraftingSpec, sampling_at
from kdcore.specs.parts.fields import ModelSpec

CONTEXT = 128
"""Maximum number of tokens of the prompt."""
LARGEST = 10_000_000_000
"""Bytes of weights above which reading them takes longer than a check may."""
SECONDS = 5.0
"""Time for the rounds of all drafters together, beside loading."""


@dataclass(frozen=True, slots=True)
class MeasuredDrafter:
    """A drafter and the cost of its rounds.

    Attributes:
        name: Name of the drafter, or of the method of a benchmark.
        batch_size: Number of prompts that were decoded at once.
        engine: The engine that ran the target.
        cost: The medians over the rounds.
    """

    name: str
    batch_size: int
    engine: str
    cost: BreakEven


@dataclass(frozen=True, slots=True)
class DrafterCost:
    """The acceptance lengths above which drafters make decoding faster on this machine.

    Attributes:
        machine: The processor and its threads, or the accelerator.
        prompt: Number of tokens of the prompt.
        drafters: The measurements; empty if nothing was measured.
        notes: What the measurement does otherwise than a later run, or why there is none.
    """

    machine: str
    prompt: int = 0
    drafters: tuple[MeasuredDrafter, ...] = ()
    notes: tuple[str, ...] = ()


def drafter_cost(
    spec: ModelSpec,
    outline: LoadedModel,
    drafters: Mapping[str, DraftingSpec],
    ids: Sequence[int],
    device: torch.device,
    registry: Registry,
    batch_sizes: Sequence[int] = (1,),
    temperature: float = 0.0,
    of: Callable[[str], AbstractContextManager[None]] = lambda name: in_field("drafter"),
) -> DrafterCost:
    """Load the target, and measure the rounds of drafters.

    A drafter without a trained folder has random weights, which cost as much as trained ones.

    Args:
        spec: The target.
        outline: The target without weights.
        drafters: Name -> drafter, tree, verifier and engine.
        ids: Token ids of the prompt, of which the last ones are decoded.
        device: The device.
        registry: The components that the drafters may name.
        batch_sizes: Numbers of copies of the prompt that are decoded at once.
        temperature: The sampling temperature.
        of: Name of a drafter -> a context that names its field in mistakes (default: drafter).

    Returns:
        The measurements, or the reason why there are none.

    Raises:
        UserError: The target or a drafter cannot be loaded, or does not fit the other.
    """
    here = machine(device)
    if reason := _not_measurable(spec, outline, device):
        return DrafterCost(here, notes=(f"not measured: {reason}",))
    with in_field("target"):
        target = load_model(spec, device=device)
    context = context_of(target.model)
    room = CONTEXT if context is None else min(CONTEXT, context - TOKENS)
    if room < 1:
        return DrafterCost(here, notes=(f"not measured: the target's context is {context} tokens",))
    prompt = list(ids[-room:])
    notes: dict[str, None] = {}
    sampling = sampling_at(temperature)

    def decoder(drafting: DraftingSpec, engine: Choice) -> Decoder:
        ran = drafting.model_copy(update={"engine": engine})
        return build_decoder(
            target, ran, sampling, registry, lambda line: notes.update({line: None})
        )

    plain: dict[str, Decoder] = {}
    found = []
    for name, drafting in drafters.items():
        with of(name):
            engine = quick_engine(target, drafting.engine, registry, notes)
            drafted = decoder(drafting, engine)
            if (key := str(engine)) not in plain:
                plain[key] = decoder(DraftingSpec.model_validate({}), engine)
        for size in batch_sizes:
            share = SECONDS / len(drafters) / len(batch_sizes)
            cost = break_even(drafted, plain[key], [prompt] * size, share)
            found.append(MeasuredDrafter(name, size, engine.name, cost))
    return DrafterCost(here, len(prompt), tuple(found), tuple(notes))


def _not_measurable(spec: ModelSpec, outline: LoadedModel, device: torch.device) -> str | None:
    """Why the target's weights are not loaded by a check; None if they are."""
    size, free = outline.weight_bytes, available_memory(device)
    if size > LARGEST:
        return f"its weights take {in_bytes(size)}, and a check reads at most {in_bytes(LARGEST)}"
    if size > free / 2:
        return f"its weights take {in_bytes(size)}, and this machine has {in_bytes(free)} free"
    return None if are_here(spec) else "its weights are not on this machine yet"


def quick_engine(
    target: LoadedModel, asked: Choice | None, registry: Registry, notes: dict[str, None]
) -> Choice:
    """The engine that a run would use, unless it has to convert the target first.

    Args:
        target: The target.
        asked: The engine of the spec, or None for the default.
        registry: The registry in which components are found.
        notes: Receives a line that says why the reference engine is used instead.

    Returns:
        The engine.

    Raises:
        UserError: The engine of the spec cannot run the target.
    """
    reference = Choice("engine", REFERENCE, registry.component("engine", REFERENCE).params())
    chosen = engine_choice(target, asked, registry)
    if chosen is None:
        return reference
    engine: Any = Assembly(registry).build(chosen)
    try:
        ready = not isinstance(engine, ConvertingEngine) or engine.converted(target.model)
    except UserError as unsuited:
        if asked is not None:
            raise
        notes[f"engine: {REFERENCE}, because {unsuited.cause}"] = None
        return reference
    if not ready:
        notes[
            f"engine: {REFERENCE}, because {chosen.name} has not converted this target yet, which "
            "takes longer than a check; rerun the check after `kdcore generate` or `kdcore bench`"
        ] = None
        return reference
    return chosen
