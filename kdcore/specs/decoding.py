"""How a target decodes, as data: drafter, tree, verifier, engine and sampling."""

from __future__ import annotations

from pydantic import Field, model_validator

from kdcore.method.choice import DrafterChoice, EngineChoice, TreeChoice, VerifierChoice
from kdcore.specs.fields import Count, Index, InputPath, NonNegative, Positive, SpecModel


class DraftingSpec(SpecModel):
    """What drafts, who verifies and which engine runs; nothing drafted is plain decoding."""

    drafter: DrafterChoice | None = Field(
        None, description="a drafter that needs no training, e.g. ngram"
    )
    folder: InputPath | None = Field(
        None, description="folder of a trained drafter, instead of drafter"
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

    @model_validator(mode="after")
    def _one_drafter(self) -> DraftingSpec:
        if self.drafter is not None and self.folder is not None:
            raise ValueError("drafter and folder cannot both be set: remove one of them")
        return self


class SamplingSpec(SpecModel):
    """How the next token is drawn, by the names and in the order of transformers' generate."""

    temperature: NonNegative = Field(0.0, description="sampling temperature; 0 is greedy decoding")
    top_k: Index = Field(0, description="sample from the k most likely tokens; 0 means all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling threshold; 1 means all tokens"
    )
    repetition_penalty: Positive = Field(
        1.0, description="penalty for tokens that occurred before; 1 means none"
    )
    max_new_tokens: Count = Field(256, description="maximum length of an answer in tokens")
