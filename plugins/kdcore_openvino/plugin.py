"""Declarations of the OpenVINO engine, and of OpenVINO GenAI as a baseline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from kdcore import Component, Params, hookimpl
from kdcore.specs.parts.fields import Count, InputPath, ModelName


class OpenVinoParams(Params):
    """Parameters of the openvino engine."""

    weights: Literal["exact", "float16", "int8"] = Field(
        "exact",
        description="stored weights: exact stores a matrix in float16 if that rounds no weight by "
        "more than float32's own rounding of the largest one, otherwise in float32; float16 "
        "rounds all matrices; int8 rounds them to 256 levels a row, so the output is that of "
        "another model",
    )


class GenAiParams(Params):
    """Parameters of the openvino_genai baseline."""

    model: InputPath | None = Field(
        None,
        description="folder that optimum-intel exported, or a GGUF file (default: a graph that is "
        "converted from the target)",
    )
    weights: Literal["exact", "float16", "int8"] = Field(
        "exact", description="form of the weights in the converted graph, as in the engine openvino"
    )
    arithmetic: Literal["float32", "bfloat16"] | None = Field(
        "float32",
        description="dtype of the products, float32 as in the engine openvino; null means "
        "OpenVINO's choice, bfloat16 on a processor that multiplies it",
    )
    cache: Literal["float32", "float16", "int8"] | None = Field(
        None, description="dtype of keys and values in the cache (default: GenAI's choice, int8)"
    )
    prompt_lookup: Count | None = Field(
        None,
        description="number of tokens that GenAI's own prompt lookup copies after a match "
        "(default: no drafts)",
    )
    longest: Count = Field(3, description="maximum number of matched tokens of prompt lookup")
    draft_model: ModelName | None = Field(
        None,
        description="smaller model with the target's tokenizer, converted like the target, which "
        "drafts in GenAI's own speculative decoding (default: no drafts)",
    )
    draft_tokens: Count = Field(5, description="number of tokens that draft_model drafts at once")

    @model_validator(mode="after")
    def _one_way_to_draft(self) -> GenAiParams:
        if self.prompt_lookup is not None and self.draft_model is not None:
            raise ValueError("prompt_lookup and draft_model cannot both be set: remove one of them")
        return self


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the engine and the baseline."""
    yield Component(
        kind="engine",
        name="openvino",
        build="kdcore_openvino.engine:OpenVinoEngine",
        summary="runs a converted graph on a CPU, in float32 arithmetic; needs kdcore[openvino]",
        source="OpenVINO (Intel), Apache-2.0",
        params=OpenVinoParams,
    )
    yield Component(
        kind="baseline",
        name="openvino_genai",
        build="kdcore_openvino.genai:GenAi",
        summary="OpenVINO GenAI on the CPU; needs kdcore[openvino-genai]",
        source="OpenVINO GenAI (Intel), Apache-2.0",
        params=GenAiParams,
    )
