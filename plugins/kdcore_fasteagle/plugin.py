"""What this package adds to kdcore: one drafter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from kdcore import Component, Params, TreeChoice, hookimpl

_BACKBONE: Any = "backbone"  # a name, which is validated like what a user writes


class FastEagleParams(Params):
    """The paper's architecture; what it does not say has our defaults."""

    depth: int = Field(
        7, gt=0, le=1024, description="levels, each a decoder layer that gives one token"
    )
    init: Literal["target", "new"] = Field(
        "new",
        description="target: the levels begin as the target's last layers, where they are Llama's "
        "in all but size; new: at random",
    )
    ffn: PositiveInt | None = Field(
        None, description="width of each level's feed-forward part; null: the target's"
    )
    features: tuple[NonNegativeInt, ...] | None = Field(
        None,
        min_length=1,
        description="the target's hidden states that it reads; null: 2, L // 2 and L - 3",
    )
    normalise: bool = Field(
        True, description="scale what it reads of the target to a mean square of 1"
    )
    vocabulary: PositiveInt | None = Field(
        None, description="propose only so many tokens, the most frequent ones; null: all"
    )
    tree: TreeChoice = Field(_BACKBONE, description="how the levels' candidates are arranged")


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the drafter."""
    yield Component(
        kind="drafter",
        name="fasteagle",
        build="kdcore_fasteagle.drafter:FastEagle",
        summary="a cascade of layers, each of which gives one token ahead; one pass for all",
        source="FastEagle, arXiv 2509.20416",
        params=FastEagleParams,
    )
