"""Declarations of the methods for models of other tokenizers or other widths."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore import Component, hookimpl
from kdcore_alignment import params


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the splitters of ULD and GOLD, and the matchers of hidden states and attention."""
    yield Component(
        kind="splitter",
        name="uld",
        build="kdcore_alignment.sorted_classes:ULD",
        summary="compares the sorted probabilities, so that the classes may be other tokens",
        source="ULD, arXiv 2402.12030; merge: GOLD, trl.experimental.gold",
        params=params.ULD,
    )
    yield Component(
        kind="splitter",
        name="gold",
        build="kdcore_alignment.shared_classes:Gold",
        summary="separates the classes that both vocabularies have from the others, which it sorts",
        source="GOLD, trl.experimental.gold: uld_use_hybrid_loss",
        params=params.Gold,
    )
    yield Component(
        kind="matcher",
        name="hidden",
        build="kdcore_alignment.hidden_states:Hidden",
        summary="compares hidden states of chosen layers, through a learned projection where the "
        "widths differ",
        source="TinyBERT, arXiv 1909.10351; FitNets, arXiv 1412.6550",
        params=params.Hidden,
    )
    yield Component(
        kind="matcher",
        name="attention",
        build="kdcore_alignment.attention:Attention",
        summary="compares the attention maps of chosen layers, head by head or averaged over heads",
        source="MiniLM, arXiv 2002.10957; TinyBERT, arXiv 1909.10351",
        params=params.Attention,
    )
