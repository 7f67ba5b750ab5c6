"""A decoder made of the components that a spec chose."""

from __future__ import annotations

from typing import Any

from kdcore.decoding.drafters.files import load_drafter, saved_choice
from kdcore.decoding.loop import Decoder, refuse_unsuited
from kdcore.decoding.sampling import Sampling
from kdcore.errors import UserError
from kdcore.method.choice import Choice
from kdcore.method.protocols import Drafter, Verifier
from kdcore.method.registry import Registry
from kdcore.models.assembly import Assembly
from kdcore.models.loaded import LoadedModel
from kdcore.specs.decoding import DraftingSpec, SamplingSpec


def build_decoder(
    target: LoadedModel, drafting: DraftingSpec, sampling: SamplingSpec, registry: Registry
) -> Decoder:
    """The drafter bound to the target, with its tree and the verifier that suits the sampling.

    Raises UserError when a component cannot be built, does not fit the others or the target, or
    takes no tree, and as `load_drafter` does.
    """
    tree, verifier = build_before_target(drafting, sampling, registry)
    drafter = _drafter(target, drafting, registry)
    if drafting.tree is not None:
        if not hasattr(drafter, "tree"):
            raise UserError(
                f"the drafter {type(drafter).__name__} takes no tree",
                "leave the tree out, or choose a drafter that gives one distribution per depth",
            )
        drafter.tree = tree
    return Decoder(target.model, drafter, verifier, _sampling(sampling))


def build_before_target(
    drafting: DraftingSpec, sampling: SamplingSpec, registry: Registry
) -> tuple[Any, Verifier]:
    """The tree, None without one, and the verifier: called first, it spares the wait for a target.

    The tree is the one that is chosen, or that of the drafter's params; the verifier the one that
    is chosen, or that which suits the sampling.
    Raises UserError when one cannot be built, does not suit the other or the sampling, or when the
    drafter's folder holds none.
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
    return tree, verifier


def greedy_decoder(target: LoadedModel, drafter: Drafter, registry: Registry) -> Decoder:
    """Of a drafter that is bound to the target already."""
    return Decoder(target.model, drafter, lossless_verifier(registry, greedy=True))


def lossless_verifier(registry: Registry, *, greedy: bool) -> Verifier:
    """The one that suits decoding by the likeliest token, or by drawing."""
    name = "greedy" if greedy else "sampling"
    verifier: Verifier = Assembly(registry).build(_named("verifier", name, registry))
    return verifier


def _drafter(target: LoadedModel, drafting: DraftingSpec, registry: Registry) -> Any:
    if drafting.folder is not None:
        return load_drafter(drafting.folder, target, registry, dtype=target.model.dtype)
    drafter = Assembly(registry).build(drafting.drafter or _named("drafter", "nothing", registry))
    drafter.bind(target.model, target.tokenizer)
    return drafter


def _sampling(spec: SamplingSpec) -> Sampling:
    return Sampling(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        repetition_penalty=spec.repetition_penalty,
    )


def _named(kind: str, name: str, registry: Registry) -> Choice:
    """A component with its default params."""
    return Choice(kind, name, registry.component(kind, name).params())
