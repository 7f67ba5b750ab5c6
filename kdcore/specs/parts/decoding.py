"""How a target decodes, as data: drafter, tree, verifier, engine and sampling."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field, model_validator

from kdcore.components.choice import DrafterChoice, EngineChoice, TreeChoice, VerifierChoice
from kdcore.specs.parts.fields import Count, Index, InputPath, NonNegative, Positive, SpecModel

Penalty: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
"""A number of logits; a hundred of them exclude a token, or force it."""
Text: TypeAlias = Annotated[str, Field(min_length=1)]


class DraftingSpec(SpecModel):
    """What drafts, who verifies and which engine runs; nothing drafted is plain decoding."""

    drafter: DrafterChoice | None = Field(
        None, description="a drafter that needs no training, e.g. ngram"
    )
    folder: InputPath | None = Field(
        None, description="folder of a trained drafter, instead of drafter"
    )
    first: DrafterChoice | None = Field(
        None,
        description="drafter that proposes first and reads tokens alone, e.g. suffix; drafter or "
        "folder proposes where it has nothing",
    )
    tree: TreeChoice | None = Field(
        None, description="draft tree, for drafters that use one (default: the drafter's own)"
    )
    verifier: VerifierChoice | None = Field(
        None, description="verifier (default: greedy at temperature 0, sampling otherwise)"
    )
    engine: EngineChoice | None = Field(
        None,
        description="engine that runs the target (default: openvino on a CPU where it is installed "
        "and converts the target, otherwise torch)",
    )

    pauses: bool = Field(
        False,
        description="stop drafting while it is slower than plain decoding; with the tree autotune, "
        "always true",
    )

    @model_validator(mode="after")
    def _drafters_are_named(self) -> DraftingSpec:
        if self.drafter is not None and self.folder is not None:
            raise ValueError("drafter and folder cannot both be set: remove one of them")
        if self.first is not None and self.drafter is None and self.folder is None:
            raise ValueError(
                "first names a drafter that is asked before another one: set drafter or folder too"
            )
        return self


class SamplingSpec(SpecModel):
    """How the next token is drawn, by the names and in the order of transformers' generate."""

    temperature: NonNegative = Field(0.0, description="sampling temperature; 0 is greedy decoding")
    top_k: Index = Field(0, description="sample from the k most likely tokens; 0 means all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling threshold; 1 means all tokens"
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="least probability of a token, relative to the most likely one; 0 means none",
    )
    typical_p: float = Field(
        1.0, gt=0, le=1, description="threshold of locally typical sampling; 1 means all tokens"
    )
    repetition_penalty: Positive = Field(
        1.0, description="penalty for tokens that occurred before; 1 means none"
    )
    presence_penalty: Penalty = Field(
        0.0, description="subtracted from the logits of tokens that occur in the answer"
    )
    frequency_penalty: Penalty = Field(
        0.0, description="subtracted from the logits once for each time the token occurs in it"
    )
    no_repeat_ngram_size: Index = Field(
        0, description="no sequence of so many tokens occurs twice; 0 means no such limit"
    )
    bad_words: list[Text] = Field([], description="texts that do not occur in an answer")
    sequence_bias: dict[Text, Penalty] = Field(
        {}, description="text -> bias that is added to the logit of its last token"
    )
    min_new_tokens: Index = Field(0, description="minimum length of an answer in tokens")
    max_new_tokens: Count = Field(256, description="maximum length of an answer in tokens")


def sampling_at(temperature: float) -> SamplingSpec:
    """The sampling settings of a temperature."""
    return SamplingSpec.model_validate({"temperature": temperature})
