"""A tiny float32 target with its tokenizer, and its greedy continuations."""

from __future__ import annotations

import copy
import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.models.assembly import Assembly
from kdcore.testing.suite import same_global_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END = "<|end|>"
CLASSES = 32
LAYERS = 3
COUNT = 16
"""Number of tokens that are decoded."""
PROMPTS = ([3, 9, 4, 11, 9, 4, 11, 9, 4, 7, 3], [17, 5], [8, 1, 30, 22, 8, 1, 30, 6, 14, 21, 2, 8])
"""Prompts of different lengths; two of them contain repetitions, for drafters that copy."""


def tokenizer() -> Any:
    """Make a tokenizer with a token for each of 31 letters, and an end token."""
    # imported here and below, so that the suites of the other kinds start fast
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: n for n, letter in enumerate([END, *string.ascii_letters[: CLASSES - 1]])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, eos_token=END, pad_token=END
    )


def target() -> PreTrainedModel:
    """Return a random Llama of three layers, a new copy at each call: a drafter may change it."""
    return copy.deepcopy(_target())


@functools.cache
def _target() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with same_global_random():
        model: PreTrainedModel = LlamaForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def likeness() -> PreTrainedModel:
    """Return a model that often, but not always, agrees with the target."""
    model = target()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return model


@dataclass(frozen=True, slots=True)
class Offline(Assembly):
    """A build context that returns the target's `likeness` for every model name."""

    def load_model(self, model: str) -> Any:
        """Return the likeness as a `kdcore.models.loading.loaded.LoadedModel`."""
        from kdcore.models.loading.loaded import LoadedModel

        return LoadedModel(likeness(), tokenizer(), model, "")


@functools.cache
def following(prompt: tuple[int, ...], count: int = COUNT) -> tuple[int, ...]:
    """Decode the target greedily after a prompt, with a full pass per token."""
    model, row = _target(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return tuple(row[len(prompt) :])


def ends() -> tuple[int, ...]:
    """Choose end tokens at which the rows of `PROMPTS` finish at different steps."""
    rows = [following(tuple(prompt)) for prompt in PROMPTS]
    return tuple(
        next(token for n, token in enumerate(row) if n >= earliest and token not in row[:n])
        for row, earliest in zip(rows[:2], (4, 8), strict=True)
    )


def up_to_end(row: tuple[int, ...], ending: tuple[int, ...]) -> list[int]:
    """Cut a row after its first end token."""
    place = next((n for n, token in enumerate(row) if token in ending), len(row))
    return list(row[: place + 1])


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows on the left with a token's id; return the ids and the mask, [B, T] each."""
    width = max(map(len, rows))
    ids = [[5] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
