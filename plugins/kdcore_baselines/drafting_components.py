"""Declarations of drafters, trees, verifiers and the reference engine. It does not import torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kdcore import Component, Params, TreeChoice
from kdcore.specs.parts.fields import (
    Count,
    Index,
    LayerIndex,
    ModelName,
    NonNegative,
    Positive,
    Size,
)

MOST = 1024
"""Maximum number of tokens in a draft; the size of their mask grows with its square."""
Few = Annotated[int, Field(gt=0, le=MOST)]
DraftVocabulary = Annotated[
    Count | None,
    Field(
        description="size of the draft vocabulary, the most frequent tokens; null means all tokens"
    ),
]
FeedForward = Annotated[
    Size | None,
    Field(description="width of the feed-forward networks; null means the target's width"),
]
Features = Annotated[
    tuple[Index, ...] | None,
    Field(
        min_length=1,
        description="indices of the target's hidden states to read; null means 2, L // 2 and L - 3",
    ),
]

_BACKBONE: Any = "backbone"  # a name, which pydantic validates like the user's input
_DYNAMIC: Any = "dynamic"
_THE_TARGETS: Any = {}


class NgramParams(Params):
    """Parameters of the ngram drafter."""

    longest: Count = Field(3, description="maximum number of matched tokens; the minimum is 1")
    length: Few = Field(10, description="number of tokens copied after the match")


class SuffixParams(Params):
    """Parameters of the suffix drafter."""

    depth: Few = Field(
        24, description="maximum number of tokens of a match and its continuation together"
    )
    nodes: Few = Field(16, description="maximum number of drafted tokens")
    factor: Positive = Field(
        1.0, description="maximum number of drafted tokens for each token of the match"
    )
    least: float = Field(
        0.1, ge=0, le=1, description="minimum probability of a drafted token, by the counts"
    )
    remember: Index = Field(
        0,
        description="number of earlier rows whose tokens are drafted from too; the drafts, and "
        "never the output, then depend on these rows",
    )


class ModelParams(Params):
    """Parameters of the model drafter."""

    model: ModelName = Field(
        description="small causal language model with the target's vocabulary",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    length: Few = Field(
        5, description="number of drafted tokens; each takes one pass of the small model"
    )
    temperature: NonNegative = Field(
        0.0,
        description="sampling temperature of the drafts; 0 is greedy, larger values suit the "
        "verifier chain_sampling",
    )


class MedusaParams(Params):
    """Parameters of the medusa drafter."""

    depth: Few = Field(4, description="number of heads; each predicts one token ahead")
    vocabulary: DraftVocabulary = None
    tree: TreeChoice = Field(_BACKBONE, description="tree of the candidates")


class LayerParams(Params):
    """Sizes of a decoder layer; null means the target's value."""

    ffn: Size | None = Field(None, description="width of the feed-forward network")
    heads: Size | None = Field(None, description="number of query heads")
    key_heads: Size | None = Field(None, description="number of key and value heads")
    head: Size | None = Field(None, description="width of a head")
    eps: Positive | None = Field(None, description="epsilon of the norms")
    theta: Positive | None = Field(None, description="base of the RoPE frequencies")


class Eagle3Params(Params):
    """Parameters of the eagle3 drafter."""

    depth: Few = Field(
        7, description="number of tokens ahead: passes unrolled in training and in a proposal"
    )
    layer: LayerParams = Field(
        _THE_TARGETS, description="sizes of the decoder layer; null means the target's value"
    )
    features: Features = None
    vocabulary: DraftVocabulary = None
    tree: TreeChoice = Field(
        _DYNAMIC, description="tree of the candidates, one that can grow pass by pass"
    )


class PEagleParams(Params):
    """Parameters of the p_eagle drafter."""

    depth: Few = Field(7, description="number of tokens ahead; all but one are read off mask slots")
    layers: int = Field(4, gt=0, le=64, description="number of decoder layers")
    ffn: FeedForward = None
    features: Features = None
    vocabulary: DraftVocabulary = None
    tree: TreeChoice = Field(_BACKBONE, description="tree of the candidates")


class DFlashParams(Params):
    """Parameters of the dflash drafter."""

    depth: Few = Field(
        7, description="number of tokens ahead; the block has one slot more, the newest token's"
    )
    layers: int = Field(5, gt=0, le=64, description="number of decoder layers")
    ffn: FeedForward = None
    features: tuple[Index, ...] | None = Field(
        None,
        min_length=1,
        description="indices of the target's hidden states to read; null means as many as the "
        "drafter has layers, at equal distances from 2 to L - 2",
    )
    vocabulary: DraftVocabulary = None
    tree: TreeChoice = Field(_BACKBONE, description="tree of the candidates")


class SelfSpeculativeParams(Params):
    """Parameters of the self_speculative drafter."""

    layers: Few | tuple[LayerIndex, ...] = Field(
        description="layers of the target that draft: the number of its first layers, or their "
        "indices in increasing order",
        examples=[8],
    )
    length: Few = Field(5, description="number of drafted tokens; each takes one pass of the part")
    temperature: NonNegative = Field(
        0.0,
        description="sampling temperature of the drafts; 0 is greedy, larger values suit the "
        "verifier chain_sampling",
    )


class DynamicParams(Params):
    """Parameters of the dynamic tree."""

    beams: Few = Field(10, description="number of nodes expanded at each depth, and children each")
    nodes: Few = Field(60, description="number of nodes to keep, those with the most likely paths")


class BackboneParams(Params):
    """Parameters of the backbone tree."""

    k: Few = Field(10, description="number of candidates at each depth")


class BestFirstParams(Params):
    """Parameters of the bestfirst tree."""

    nodes: Few = Field(16, description="number of nodes, all verified in one pass")


class AutotuneParams(Params):
    """Parameters of the autotune tree."""

    most: Few = Field(31, description="maximum number of nodes")
    beams: Few = Field(
        10,
        description="number of nodes expanded at each depth, and children each, for a drafter that "
        "reads its own drafts",
    )


class TypicalParams(Params):
    """Parameters of the typical verifier."""

    epsilon: float = Field(0.09, gt=0, lt=1, description="maximum of the threshold")
    delta: Positive = Field(0.3, description="factor of the threshold delta exp(-entropy)")


DRAFTING = (
    Component(
        kind="drafter",
        name="nothing",
        build="kdcore_baselines.drafters.untrained:Nothing",
        summary="drafts nothing: plain decoding",
        source="the neutral element",
    ),
    Component(
        kind="drafter",
        name="ngram",
        build="kdcore_baselines.drafters.untrained:Ngram",
        params=NgramParams,
        summary="copies the tokens that followed an earlier occurrence of the last tokens",
        source="Saxena 2023, Prompt Lookup Decoding; overlapping copies as in LZ77",
    ),
    Component(
        kind="drafter",
        name="suffix",
        build="kdcore_baselines.drafters.suffix:Suffix",
        params=SuffixParams,
        summary="drafts a tree of what most often followed the last tokens",
        source="SuffixDecoding, arXiv 2411.04975",
    ),
    Component(
        kind="drafter",
        name="model",
        build="kdcore_baselines.drafters.untrained:SmallModel",
        params=ModelParams,
        summary="drafts a chain with a small model of the same vocabulary",
        source="Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)",
    ),
    Component(
        kind="drafter",
        name="self_speculative",
        build="kdcore_baselines.drafters.untrained:SelfSpeculative",
        params=SelfSpeculativeParams,
        summary="drafts a chain with some of the target's own layers",
        source="Zhang et al. 2024, Draft & Verify (arXiv 2309.08168); "
        "Elhoushi et al. 2024, LayerSkip (arXiv 2404.16710)",
    ),
    Component(
        kind="drafter",
        name="medusa",
        build="kdcore_baselines.drafters.medusa:Medusa",
        params=MedusaParams,
        summary="predicts each token ahead with its own head on the target's last hidden state",
        source="Cai et al. 2024, Medusa (arXiv 2401.10774), section 2.1.1",
    ),
    Component(
        kind="drafter",
        name="eagle3",
        build="kdcore_baselines.drafters.eagle3:Eagle3",
        params=Eagle3Params,
        summary="drafts token by token with one layer, which reads its own hidden states",
        source="Li et al. 2025, EAGLE-3 (arXiv 2503.01840)",
    ),
    Component(
        kind="drafter",
        name="p_eagle",
        build="kdcore_baselines.drafters.p_eagle:PEagle",
        params=PEagleParams,
        summary="predicts all tokens in one pass of EAGLE-3's layers, from learned mask slots",
        source="P-EAGLE (arXiv 2602.01469)",
    ),
    Component(
        kind="drafter",
        name="dflash",
        build="kdcore_baselines.drafters.dflash:DFlash",
        params=DFlashParams,
        summary="denoises a block of mask slots in one pass, conditioned on the target's states",
        source="Chen et al. 2026, DFlash (arXiv 2602.06036)",
    ),
    Component(
        kind="tree",
        name="chain",
        build="kdcore_baselines.trees:chain",
        summary="most likely token at each depth",
        source="Stern et al. 2018 (arXiv 1811.03115)",
    ),
    Component(
        kind="tree",
        name="backbone",
        build="kdcore_baselines.trees:backbone",
        params=BackboneParams,
        summary="k candidates at each depth; only the most likely one is expanded",
        source="FastEagle (arXiv 2509.20416), section 3",
    ),
    Component(
        kind="tree",
        name="bestfirst",
        build="kdcore_baselines.trees:BestFirst",
        params=BestFirstParams,
        summary="nodes with the most likely paths, which maximise the expected tokens",
        source="Wang et al. 2024, OPT-Tree (arXiv 2406.17276), for levels that are independent",
    ),
    Component(
        kind="tree",
        name="autotune",
        build="kdcore_baselines.trees:Autotune",
        params=AutotuneParams,
        summary="most likely nodes, as many as pay by measured costs, or none",
        source="ours, after Sequoia (arXiv 2402.12374), section 3.3",
    ),
    Component(
        kind="tree",
        name="dynamic",
        build="kdcore_baselines.trees:Dynamic",
        params=DynamicParams,
        summary="beam search, then the most likely of all nodes; for all drafters",
        source="Li et al. 2024, EAGLE-2 (arXiv 2406.16858), section 4",
    ),
    Component(
        kind="verifier",
        name="greedy",
        build="kdcore_baselines.verifiers:Greedy",
        summary="accepts the target's most likely tokens; lossless at temperature 0",
        source="Stern et al. 2018 (arXiv 1811.03115)",
    ),
    Component(
        kind="verifier",
        name="sampling",
        build="kdcore_baselines.verifiers:Sampling",
        summary="accepts the tokens that the target samples; lossless for any candidates",
        source="Miao et al. 2024, SpecInfer (arXiv 2305.09781), without a draft distribution",
    ),
    Component(
        kind="verifier",
        name="chain_sampling",
        build="kdcore_baselines.verifiers:ChainSampling",
        summary="accepts sampled tokens with min(1, target / draft), else resamples; lossless",
        source="Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)",
    ),
    Component(
        kind="verifier",
        name="typical",
        build="kdcore_baselines.verifiers:Typical",
        params=TypicalParams,
        summary="accepts tokens that are likely enough under the target; NOT lossless",
        source="Cai et al. 2024, Medusa (arXiv 2401.10774), section 2.3.1",
    ),
    Component(
        kind="engine",
        name="torch",
        build="kdcore.decoding.engines.torch_engine:TorchEngine",
        summary="runs the transformers model itself, on any device; the reference",
        source="the neutral element",
    ),
)
