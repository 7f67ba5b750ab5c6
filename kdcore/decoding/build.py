"""Construction of a decoder from the components that a spec names."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.decoding.drafters.fallback import FallbackDrafter
from kdcore.decoding.drafters.files import load_drafter, saved_choice
from kdcore.decoding.engines.protocols import CompilingEngine, Engine
from kdcore.decoding.loop import Decoder, refuse_unsuited
from kdcore.decoding.protocols import CompiledDrafter, Drafter, Verifier
from kdcore.decoding.sampling import Sampling
from kdcore.decoding.trials.drafting_account import DraftingAccount
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.models.facts import end_ids
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.decoding import DraftingSpec, SamplingSpec

REFERENCE = "torch"
"""The engine that calls the target itself."""
FAST_ON_CPU = "openvino"
"""The default engine of a target on a CPU, where the package of that name is installed."""
WORTH = 20_000_000
"""Number of weights below which converting a target takes longer than the engine saves."""


def build_decoder(
    target: LoadedModel,
    drafting: DraftingSpec,
    sampling: SamplingSpec,
    registry: Registry,
    note: Callable[[str], None] | None = None,
    engines: BoundEngines | None = None,
) -> Decoder:
    """Build a decoder: the drafter bound to the target, its tree, the verifier and the engine.

    Args:
        target: The target.
        drafting: The drafter, tree, verifier and engine.
        sampling: The sampling settings.
        registry: The registry in which components are found.
        note: A function that shows a line, such as the reason why the default engine is not used.
        engines: The engines of decoders that take turns with this one; None for one of its own.

    Returns:
        The decoder.

    Raises:
        UserError: A component cannot be built or does not fit the others or the target, the
            drafter does not accept a tree, or the drafter's folder cannot be loaded.
    """
    tree, verifier = build_before_target(drafting, sampling, registry)
    drafter = _drafter(target, drafting, registry)
    if drafting.tree is not None:
        if not hasattr(drafter, "tree"):
            raise UserError(
                f"the drafter {type(drafter).__name__} does not accept a tree",
                "remove the tree, or choose a drafter that proposes one distribution per depth",
            )
        drafter.tree = tree
    if engines is None:
        engines = BoundEngines(target, registry)
    engine = engines.bound(drafting.engine, drafter.layers, note)
    _let_engine_draft(drafter, engine, note)
    if drafting.first is not None:
        drafter = FallbackDrafter(_untrained(target, drafting.first, registry), drafter)
    account = DraftingAccount() if drafting.pauses else None
    return Decoder(target.model, drafter, verifier, _sampling(sampling, target), engine, account)


class BoundEngines:
    """The engines of a target's decoders, which never decode at the same time.

    Decoders with the same engine and hidden states share it: an engine may hold weights of its own.

    Args:
        target: The target.
        registry: The registry in which components are found.
    """

    def __init__(self, target: LoadedModel, registry: Registry) -> None:
        self._target, self._registry = target, registry
        self._bound: dict[tuple[str, tuple[int, ...]], Engine | None] = {}

    def bound(
        self,
        choice: Choice | None,
        layers: tuple[int, ...],
        note: Callable[[str], None] | None = None,
    ) -> Engine | None:
        """The engine of a choice that returns these hidden states; see `bound_engine`."""
        key = json.dumps(None if choice is None else choice.dump(), sort_keys=True), layers
        if key not in self._bound:
            self._bound[key] = bound_engine(self._target, layers, choice, self._registry, note)
        return self._bound[key]


def bound_engine(
    target: LoadedModel,
    layers: tuple[int, ...],
    choice: Choice | None,
    registry: Registry,
    note: Callable[[str], None] | None = None,
) -> Engine | None:
    """Build an engine and bind it to a target.

    Args:
        target: The target.
        layers: Hidden states that the engine returns.
        choice: The engine, or None for the fastest one that runs this target exactly.
        registry: The registry in which components are found.
        note: A function that shows a line, such as the reason why the default engine is not used.

    Returns:
        The engine; None for the reference engine.

    Raises:
        UserError: The chosen engine cannot run the target, or the target lacks one of the layers.
    """
    chosen = engine_choice(target, choice, registry)
    if chosen is None:
        return None
    try:
        return _bound(chosen, target, layers, registry)
    except UserError as unsuited:
        if choice is not None:
            raise
        if note is not None:
            note(f"engine: torch, because {unsuited.cause}")
    return None


def engine_choice(target: LoadedModel, choice: Choice | None, registry: Registry) -> Choice | None:
    """The engine that would run a target.

    Args:
        target: The target.
        choice: The engine of a spec, or None for the default.
        registry: The registry in which components are found.

    Returns:
        The engine, which may refuse the target yet; None for the reference engine.
    """
    if choice is not None:
        return None if choice.name == REFERENCE else choice
    suits = (
        target.model.device.type == "cpu"
        and FAST_ON_CPU in registry.names("engine")
        and importlib.util.find_spec(FAST_ON_CPU) is not None
        and sum(weight.numel() for weight in target.model.parameters()) >= WORTH
    )
    return _named("engine", FAST_ON_CPU, registry) if suits else None


def _let_engine_draft(
    drafter: Drafter, engine: Engine | None, note: Callable[[str], None] | None
) -> None:
    """Let the engine run the drafter's passes, where both can; otherwise torch runs them."""
    if isinstance(drafter, CompiledDrafter) and isinstance(engine, CompilingEngine):
        try:
            drafter.use_engine(engine)
        except UserError as unsuited:
            if note is not None:
                note(f"drafter: in torch, because {unsuited.cause}")


def _bound(
    choice: Choice, target: LoadedModel, layers: tuple[int, ...], registry: Registry
) -> Engine:
    engine: Engine = Assembly(registry).build(choice)
    engine.bind(target.model, layers)
    return engine


def build_before_target(
    drafting: DraftingSpec, sampling: SamplingSpec, registry: Registry
) -> tuple[Any, Verifier]:
    """Build the tree and the verifier; errors show before the target is loaded.

    Args:
        drafting: The drafter, tree and verifier. The default tree is that of the drafter's params;
            the default verifier suits the sampling.
        sampling: The sampling settings.
        registry: The registry in which components are found.

    Returns:
        The tree, or None without one, and the verifier.

    Raises:
        UserError: One cannot be built or does not suit the other or the sampling, or the
            drafter's folder does not contain a drafter.
    """
    assembly = Assembly(registry)
    verifier: Verifier = (
        assembly.build(drafting.verifier)
        if drafting.verifier
        else lossless_verifier(registry, greedy=not sampling.temperature)
    )
    drafter = drafting.drafter
    if drafting.folder is not None:
        drafter = saved_choice(drafting.folder, registry)
    chosen = drafting.tree or getattr(drafter and drafter.params, "tree", None)
    tree = assembly.build(chosen) if isinstance(chosen, Choice) else None
    refuse_unsuited(verifier, _sampling(sampling), tree)
    if drafting.first is not None and getattr(verifier, "chain", False):
        raise UserError(
            f"{type(verifier).__name__} follows a single chain, and two drafters propose a tree",
            "remove first, or choose the verifier 'sampling'",
            "first",
        )
    return tree, verifier


def greedy_decoder(
    target: LoadedModel, drafter: Drafter, registry: Registry, engine: Engine | None = None
) -> Decoder:
    """A greedy decoder for a drafter that is already bound to the target, and drafts in each round.

    Args:
        target: The target.
        drafter: The drafter.
        registry: The registry of the verifier.
        engine: An engine that is bound to the target and the drafter's layers, or to more (default:
            the reference engine).

    Returns:
        The decoder.
    """
    verifier = lossless_verifier(registry, greedy=True)
    decoder = Decoder(target.model, drafter, verifier, engine=engine)
    decoder.always_draft()
    return decoder


def lossless_verifier(registry: Registry, *, greedy: bool) -> Verifier:
    """The lossless verifier for greedy decoding, or for sampling."""
    name = "greedy" if greedy else "sampling"
    verifier: Verifier = Assembly(registry).build(_named("verifier", name, registry))
    return verifier


def _drafter(target: LoadedModel, drafting: DraftingSpec, registry: Registry) -> Any:
    if drafting.folder is not None:
        return load_drafter(drafting.folder, target, registry, dtype=target.model.dtype)
    return _untrained(target, drafting.drafter or _named("drafter", "nothing", registry), registry)


def _untrained(target: LoadedModel, choice: Choice, registry: Registry) -> Any:
    drafter = Assembly(registry, target.model.device).build(choice)
    drafter.bind(target.model, target.tokenizer)
    if isinstance(drafter, torch.nn.Module):  # untrained: in the target's dtype, like a trained one
        drafter.to(target.model.device, target.model.dtype).eval()
    return drafter


def _sampling(spec: SamplingSpec, target: LoadedModel | None = None) -> Sampling:
    """The sampling settings; without a target, all but those that need its tokenizer."""
    return Sampling(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        typical_p=spec.typical_p,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        min_new_tokens=spec.min_new_tokens,
        ends=tuple(end_ids(target)) if target else (),
        processors=tuple(_processors(spec, target)) if target else (),
    )


def _processors(spec: SamplingSpec, target: LoadedModel) -> Iterator[LogitsProcessor]:
    """The processors that read the tokens before, in the order of ``generate``."""
    if spec.sequence_bias:
        bias: list[Any] = [
            [ids, value]
            for text, value in spec.sequence_bias.items()
            for ids in _spellings(text, target)
        ]
        yield SequenceBiasLogitsProcessor(bias)
    if spec.no_repeat_ngram_size:
        yield NoRepeatNGramLogitsProcessor(spec.no_repeat_ngram_size)
    if spec.bad_words:
        words = [ids for text in spec.bad_words for ids in _spellings(text, target)]
        yield NoBadWordsLogitsProcessor(words)


def _spellings(text: str, target: LoadedModel) -> list[list[int]]:
    """The token ids of a text at the start of a text, and after a space."""
    found = [
        tuple(target.tokenizer(each, add_special_tokens=False).input_ids)
        for each in (text, f" {text}")
    ]
    return [list(ids) for ids in dict.fromkeys(found) if ids]


def _named(kind: str, name: str, registry: Registry) -> Choice:
    """A component with its default params."""
    return Choice(kind, name, registry.component(kind, name).params())


def refuse_untrainable(choice: Choice, assembly: Assembly) -> None:
    """Raises UserError for a drafter without weights of its own, before any model is loaded."""
    if not hasattr(assembly.build(choice), "choose_vocabulary"):  # of a TrainedDrafter
        raise UserError(
            f"drafter '{choice.name}' is not trainable",
            "choose another drafter: see `kdcore plugins list`",
            "drafter",
        )
