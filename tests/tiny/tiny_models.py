"""Random models of a few thousand weights, one for each family that the tests walk."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def _config(family: str, classes: int, layers: int) -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(
            vocab_size=classes, n_embd=32, n_layer=layers, n_head=4, n_positions=128, **ends
        )
    made = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "mistral": MistralConfig,
        "gemma2": Gemma2Config,
    }[family]
    return made(vocab_size=classes, num_hidden_layers=layers, **_SHAPE, **ends)


FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gpt2")


def language_model(
    family: str = "llama", classes: int = 61, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A causal language model in float32, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, classes, layers))
    return model.float().eval()


def classifier(classes: int = 7, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier in float32, in eval mode."""
    torch.manual_seed(seed)
    config = _config("llama", 61, layers)
    config.num_labels = classes
    return AutoModelForSequenceClassification.from_config(config).float().eval()
