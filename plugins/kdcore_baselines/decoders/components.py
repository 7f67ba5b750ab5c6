"""Declarations of the baselines of `bench`. This module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcore import Component, Params
from kdcore.specs.parts.fields import Count, InputPath, ModelName


class PromptLookupParams(Params):
    """Parameters of the prompt_lookup baseline."""

    tokens: Count = Field(
        10, description="number of tokens copied after a match (prompt_lookup_num_tokens)"
    )


class AssistedParams(Params):
    """Parameters of the assisted baseline."""

    model: ModelName = Field(
        description="smaller model with the target's tokenizer",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )


class LlamaCppParams(Params):
    """Parameters of the llama_cpp baseline."""

    gguf: InputPath | None = Field(
        None,
        description="GGUF file of the target, e.g. a quantised one (default: a file that is "
        "written from the target's weights)",
    )
    weights: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="dtype of the matrices in the written file"
    )
    prompt_lookup: Count | None = Field(
        None,
        description="number of tokens that llama-cpp-python's own prompt lookup copies after a "
        "match (default: no drafts)",
    )


DECODERS = (
    Component(
        kind="baseline",
        name="generate",
        build="kdcore_baselines.decoders.transformers_generate:Generate",
        summary="generate of transformers",
        source="transformers, Apache-2.0",
    ),
    Component(
        kind="baseline",
        name="prompt_lookup",
        build="kdcore_baselines.decoders.transformers_generate:PromptLookup",
        summary="generate of transformers with prompt lookup, one prompt at a time",
        source="Saxena 2023, Prompt Lookup Decoding; transformers, Apache-2.0",
        params=PromptLookupParams,
    ),
    Component(
        kind="baseline",
        name="assisted",
        build="kdcore_baselines.decoders.transformers_generate:Assisted",
        summary="generate of transformers with an assistant model, one prompt at a time",
        source="Leviathan et al. 2023 (arXiv 2211.17192); transformers, Apache-2.0",
        params=AssistedParams,
    ),
    Component(
        kind="baseline",
        name="llama_cpp",
        build="kdcore_baselines.decoders.llama_cpp:LlamaCpp",
        summary="llama.cpp on the CPU, one prompt at a time; needs kdcore[llama-cpp]",
        source="llama-cpp-python and llama.cpp, MIT",
        params=LlamaCppParams,
    ),
)
