"""Declaration of the FastEagle drafter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from kdcore import Component, Params, TreeChoice, hookimpl
from kdcore.specs.parts.fields import Count, Index, Size

_BACKBONE: Any = "backbone"  # a name, which pydantic validates like the user's input


class FastEagleParams(Params):
    """Parameters of the fasteagle drafter; defaults that the paper does not give are kdcore's."""

    depth: int = Field(
        7,
        gt=0,
        le=1024,
        description="number of levels; each is a decoder layer that predicts one token",
    )
    init: Literal["target", "new"] = Field(
        "new",
        description="initial weights of the levels: those of the target's last layers (of Llama's "
        "architecture), or random",
    )
    ffn: Size | None = Field(
        None,
        description="width of each level's feed-forward network; null means the target's width",
    )
    features: tuple[Index, ...] | None = Field(
        None,
        min_length=1,
        description="indices of the target's hidden states to read; null means 2, L // 2 and L - 3",
    )
    normalise: bool = Field(
        True, description="scaling of the target's hidden states and embeddings to mean square 1"
    )
    norms: Literal["each", "one", "none"] = Field(
        "each",
        description="norm before the target's head: each level's own, one for all levels, or none",
    )
    vocabulary: Count | None = Field(
        None,
        description="size of the draft vocabulary, the most frequent tokens; null means all tokens",
    )
    tree: TreeChoice = Field(_BACKBONE, description="tree of the candidates")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the drafter."""
    yield Component(
        kind="drafter",
        name="fasteagle",
        build="kdcore_fasteagle.drafter:FastEagle",
        summary="predicts all tokens in one pass with a cascade of layers, one for each token",
        source="FastEagle, arXiv 2509.20416",
        params=FastEagleParams,
    )
