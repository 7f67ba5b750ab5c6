"""Random models of a few thousand weights, of each family that the tests walk."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gpt2"]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
_IN_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_NOT_IN_GPT2 = {"intermediate_size", "num_key_value_heads", "head_dim"}


def config_of(family: str, **size: Any) -> PreTrainedConfig:
    """The config of a family. The fields have Llama's names, also for a GPT-2."""
    if family != "gpt2":
        return CONFIGS[family](**size)  # type: ignore[no-any-return]
    known = {name: value for name, value in size.items() if name not in _NOT_IN_GPT2}
    return GPT2Config(**{_IN_GPT2.get(name, name): value for name, value in known.items()})


SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def language_model(
    family: str = "llama", classes: int = 61, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A causal language model in float32, in eval mode."""
    torch.manual_seed(seed)
    config = config_of(family, vocab_size=classes, num_hidden_layers=layers, **SIZE)
    return AutoModelForCausalLM.from_config(config).float().eval()


def classifier(classes: int = 7, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier in float32, in eval mode."""
    torch.manual_seed(seed)
    config = config_of("llama", vocab_size=61, num_hidden_layers=layers, **SIZE)
    config.num_labels = classes
    return AutoModelForSequenceClassification.from_config(config).float().eval()
