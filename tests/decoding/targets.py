"""Tiny random models of five families, and what transformers generates with them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

CLASSES = 61
CONTEXT = 96
WINDOW = 7
"""Shorter than the prompts, so that sliding layers slide."""

SIZE = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = SIZE | {"head_dim": 8, "sliding_window": WINDOW}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def config_of(family: str, **changes: object) -> PreTrainedConfig:
    if family == "gpt2":
        size = {"vocab_size": CLASSES, "n_embd": 32, "n_layer": 3, "n_head": 4}
        size |= {"n_positions": CONTEXT, "initializer_range": 0.4}
        size |= {"bos_token_id": None, "eos_token_id": None}
        return GPT2Config(**(size | changes))
    make, size = {
        "llama": (LlamaConfig, SIZE),
        "qwen2": (Qwen2Config, SIZE | TYPES | {"use_sliding_window": True, "sliding_window": WINDOW}),
        "mistral": (MistralConfig, SIZE | {"sliding_window": WINDOW}),
        "gemma2": (Gemma2Config, GEMMA | TYPES),
        "gemma3": (Gemma3TextConfig, GEMMA | TYPES),
    }[family]
    return make(**(size | changes))


FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2"]


@functools.cache
def tiny(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """Gemma 2 caps its attention scores, which sdpa cannot."""
    torch.manual_seed(seed)
    attention = "eager" if family == "gemma2" else attention
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def prompts(rows: int, seed: int = 1, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Prompts [B, T] of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [11, 2, 17][:rows]
    tokens = torch.randint(classes, (rows, max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths])
    return tokens * mask, mask.long()


def generated(model: PreTrainedModel, count: int, rows: int = 1, **settings: object) -> list[list[int]]:
    """What transformers generates for each row, as one batch; the prompts are left out."""
    ids, mask = prompts(rows)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **settings
    )
    return output[:, ids.shape[1] :].tolist()
