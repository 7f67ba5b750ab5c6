"""Random models of six families that decode, and what transformers generates with them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.models.assembly import Assembly
from tests.tiny import models

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
    "tie_word_embeddings": False,
}
_MIXED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2": _MIXED | {"use_sliding_window": True},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": _MIXED | {"head_dim": 8},
    "gemma3": _MIXED | {"head_dim": 8},
}


def config_of(family: str, **changes: object) -> PreTrainedConfig:
    return models.config_of(family, **(SIZE | _OWN.get(family, {}) | changes))


FAMILIES = [*models.FAMILIES, "gemma3"]


def attentions(family: str) -> list[str]:
    """Gemma 2 caps its attention scores, which sdpa cannot."""
    return ["eager"] if family == "gemma2" else ["sdpa", "eager"]


@functools.cache
def tiny(family: str, attention: str = "", seed: int = 0, **changes: object) -> PreTrainedModel:
    """The random model of a family. Do not change it: others use it too."""
    torch.manual_seed(seed)
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention or attentions(family)[0]
    )
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def tokenizer_of(classes: int = CLASSES) -> Any:
    """A vocabulary, as far as drafters ask for one."""
    vocabulary = {f"token {n}": n for n in range(classes)}
    return SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=None)


class Loads:
    """A build context that loads one model, whatever its name, and builds what is installed."""

    def __init__(self, model: PreTrainedModel, classes: int = CLASSES) -> None:
        self.loaded = SimpleNamespace(model=model, tokenizer=tokenizer_of(classes))

    def load_model(self, model: str) -> Any:
        return self.loaded

    def build(self, choice: Choice) -> Any:
        return Assembly(installed()).build(choice)


def prompts(rows: int, classes: int = CLASSES) -> list[list[int]]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(classes, (length,), generator=generator).tolist()
        for length in [11, 2, 17][:rows]
    ]


def padded(rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]; padding looks like any token."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        places = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[index, places] = torch.tensor(row, dtype=torch.int64)
        mask[index, places] = 1
    return ids, mask


def generated(
    model: PreTrainedModel, rows: list[list[int]], count: int, **settings: object
) -> list[list[int]]:
    """What transformers generates greedily after each row, as one batch."""
    ids, mask = padded(rows)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **settings
    )
    return output[:, ids.shape[1] :].tolist()
