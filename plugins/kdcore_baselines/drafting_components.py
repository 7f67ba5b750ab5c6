"""Drafters, trees and verifiers, declared without importing torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from kdcore import Component, Params, TreeChoice
from kdcore.specs.fields import ModelName

MOST = 1024
"""Tokens of one draft; their mask has the square of so many entries."""
Few = Annotated[int, Field(gt=0, le=MOST)]

_BACKBONE: Any = "backbone"  # a name, which is validated like what a user writes
_DYNAMIC: Any = "dynamic"
_THE_TARGETS: Any = {}


class NgramParams(Params):
    """Of the drafter ``ngram``."""

    longest: PositiveInt = Field(3, description="tokens matched at first; then one less, down to 1")
    length: Few = Field(10, description="tokens copied after the match")


class ModelParams(Params):
    """Of the drafter ``model``."""

    model: ModelName = Field(
        description="a small causal language model of the target's vocabulary",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    length: Few = Field(5, description="tokens drafted, one pass of the small model each")
    temperature: float = Field(
        0.0, ge=0, description="0 drafts its likeliest tokens; above, it samples (chain_sampling)"
    )


class MedusaParams(Params):
    """Of the drafter ``medusa``."""

    depth: Few = Field(4, description="heads, each of which gives one token")
    vocabulary: PositiveInt | None = Field(
        None, description="propose only so many tokens, the most frequent ones; null: all"
    )
    tree: TreeChoice = Field(_BACKBONE, description="how the heads' candidates are arranged")


class LayerParams(Params):
    """Sizes of a layer; null: the target's."""

    ffn: PositiveInt | None = Field(None, description="width of the feed-forward part")
    heads: PositiveInt | None = Field(None, description="of the queries")
    key_heads: PositiveInt | None = Field(None, description="of the keys and values")
    head: PositiveInt | None = Field(None, description="width of each")
    eps: PositiveFloat | None = Field(None, description="of the norms")
    theta: PositiveFloat | None = Field(None, description="base of RoPE")


class Eagle3Params(Params):
    """Of the drafter ``eagle3``."""

    depth: Few = Field(7, description="tokens ahead: passes unrolled, and of a proposal")
    layer: LayerParams = Field(
        _THE_TARGETS, description="sizes of its layer; what is null is the target's"
    )
    features: tuple[NonNegativeInt, ...] | None = Field(
        None,
        min_length=1,
        description="the target's hidden states that it reads; null: 2, L // 2 and L - 3",
    )
    vocabulary: PositiveInt | None = Field(
        None, description="propose only so many tokens, the most frequent ones; null: all"
    )
    tree: TreeChoice = Field(
        _DYNAMIC, description="how its candidates are arranged; one that grows"
    )


class DynamicParams(Params):
    """Of the tree ``dynamic``."""

    beams: Few = Field(10, description="nodes expanded at each depth, into as many each")
    nodes: Few = Field(60, description="nodes kept of all, the likeliest paths")


class BackboneParams(Params):
    """Of the tree ``backbone``."""

    k: Few = Field(10, description="candidates at each depth")


class BestFirstParams(Params):
    """Of the tree ``bestfirst``."""

    nodes: Few = Field(16, description="nodes of the tree, all verified in one pass")


class AutotuneParams(Params):
    """Of the tree ``autotune``."""

    most: Few = Field(31, description="nodes of the largest tree that is considered")


class TypicalParams(Params):
    """Of the verifier ``typical``."""

    epsilon: float = Field(0.09, gt=0, lt=1, description="the highest threshold")
    delta: float = Field(0.3, gt=0, description="the threshold is delta exp(-entropy)")


DRAFTING = (
    Component(
        kind="drafter",
        name="nothing",
        build="kdcore_baselines.drafters:Nothing",
        summary="drafts nothing: plain decoding",
        source="the neutral element",
    ),
    Component(
        kind="drafter",
        name="ngram",
        build="kdcore_baselines.drafters:Ngram",
        params=NgramParams,
        summary="copies what followed the last tokens earlier in the row",
        source="Saxena 2023, Prompt Lookup Decoding; overlapping copies as in LZ77",
    ),
    Component(
        kind="drafter",
        name="model",
        build="kdcore_baselines.drafters:SmallModel",
        params=ModelParams,
        summary="a small model of the same vocabulary drafts a chain",
        source="Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)",
    ),
    Component(
        kind="drafter",
        name="medusa",
        build="kdcore_baselines.medusa:Medusa",
        params=MedusaParams,
        summary="heads on the target's final hidden state, each of which gives one token ahead",
        source="Cai et al. 2024, Medusa (arXiv 2401.10774), section 2.1.1",
    ),
    Component(
        kind="drafter",
        name="eagle3",
        build="kdcore_baselines.eagle3:Eagle3",
        params=Eagle3Params,
        summary="a layer that drafts token after token, each pass reading what the last one gave",
        source="Li et al. 2025, EAGLE-3 (arXiv 2503.01840)",
    ),
    Component(
        kind="tree",
        name="chain",
        build="kdcore_baselines.trees:chain",
        summary="the likeliest token at each depth",
        source="Stern et al. 2018 (arXiv 1811.03115)",
    ),
    Component(
        kind="tree",
        name="backbone",
        build="kdcore_baselines.trees:backbone",
        params=BackboneParams,
        summary="k candidates at each depth, the likeliest alone expanded",
        source="FastEagle (arXiv 2509.20416), section 3",
    ),
    Component(
        kind="tree",
        name="bestfirst",
        build="kdcore_baselines.trees:BestFirst",
        params=BestFirstParams,
        summary="the nodes whose paths are the likeliest: most expected tokens for their number",
        source="Wang et al. 2024, OPT-Tree (arXiv 2406.17276), for levels that are independent",
    ),
    Component(
        kind="tree",
        name="autotune",
        build="kdcore_baselines.trees:Autotune",
        params=AutotuneParams,
        summary="bestfirst, sized at every round by the measured cost of verifying it",
        source="ours, after Sequoia (arXiv 2402.12374), section 3.3",
    ),
    Component(
        kind="tree",
        name="dynamic",
        build="kdcore_baselines.trees:Dynamic",
        params=DynamicParams,
        summary="beams at each depth, and the likeliest of all nodes; for drafters of any kind",
        source="Li et al. 2024, EAGLE-2 (arXiv 2406.16858), section 4",
    ),
    Component(
        kind="verifier",
        name="greedy",
        build="kdcore_baselines.verifiers:Greedy",
        summary="keeps what equals the target's likeliest tokens; lossless at temperature 0",
        source="Stern et al. 2018 (arXiv 1811.03115)",
    ),
    Component(
        kind="verifier",
        name="sampling",
        build="kdcore_baselines.verifiers:Sampling",
        summary="keeps what the target itself samples; lossless for any candidates",
        source="Miao et al. 2024, SpecInfer (arXiv 2305.09781), without a draft distribution",
    ),
    Component(
        kind="verifier",
        name="chain_sampling",
        build="kdcore_baselines.verifiers:ChainSampling",
        summary="keeps a sampled chain with min(1, target / draft), else resamples; lossless",
        source="Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)",
    ),
    Component(
        kind="verifier",
        name="typical",
        build="kdcore_baselines.verifiers:Typical",
        params=TypicalParams,
        summary="keeps what is likely enough for the target; NOT lossless",
        source="Cai et al. 2024, Medusa (arXiv 2401.10774), section 2.3.1",
    ),
)
