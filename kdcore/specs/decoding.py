"""How a target decodes, as data: what drafts, in which tree, who verifies, how it samples."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from kdcore.method.choice import DrafterChoice, TreeChoice, VerifierChoice
from kdcore.specs.fields import InputPath, SpecModel


class DraftingSpec(SpecModel):
    """What drafts, and who verifies; nothing drafted is plain decoding."""

    drafter: DrafterChoice | None = Field(
        None, description="one that needs no training, e.g. ngram"
    )
    folder: InputPath | None = Field(None, description="or the folder of a trained drafter")
    tree: TreeChoice | None = Field(
        None, description="for a drafter that takes one; by default the drafter's own"
    )
    verifier: VerifierChoice | None = Field(
        None, description="by default greedy at temperature 0, and sampling above"
    )

    @model_validator(mode="after")
    def _one_drafter(self) -> DraftingSpec:
        if self.drafter is not None and self.folder is not None:
            raise ValueError("drafter and folder both name a drafter: remove one of them")
        return self


class SamplingSpec(SpecModel):
    """How the next token is drawn, by the names and in the order of transformers' generate."""

    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="sample among so many of the likeliest; 0 is all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the likeliest of this probability together"
    )
    repetition_penalty: PositiveFloat = Field(
        1.0, description="above 1, tokens that stood before become less likely"
    )
    max_new_tokens: PositiveInt = Field(256, description="longest answer, in tokens")
