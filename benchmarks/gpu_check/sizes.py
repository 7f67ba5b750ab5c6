"""The shapes of the models, and how much is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True, slots=True)
class Size:
    """How large the models are and how much is measured.

    Attributes:
        teacher: Fields of the teacher's LlamaConfig; it is the target of decoding too.
        student: Fields of the student's.
        rows: Rows of a training batch.
        length: Positions of each row.
        steps: Training steps that are timed, after `warm_up` others.
        warm_up: Steps before them.
        prompts: Number of prompts that are decoded, one after another.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens of an answer.
        repeats: Timed decodings of all prompts, after one other.
        depth: Levels of the drafters.
    """

    teacher: dict[str, Any]
    student: dict[str, Any]
    rows: int
    length: int
    steps: int
    warm_up: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    depth: int


def _llama(
    classes: int, hidden: int, inner: int, layers: int, heads: int, kv: int
) -> dict[str, Any]:
    return _NO_END | {
        "vocab_size": classes,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,  # a tied random model repeats its last token
    }


SIZES = {
    "tiny": Size(
        teacher=_llama(320, 32, 64, 6, 4, 2),
        student=_llama(320, 16, 32, 2, 2, 1),
        rows=2,
        length=24,
        steps=2,
        warm_up=1,
        prompts=2,
        prompt_tokens=8,
        new_tokens=12,
        repeats=1,
        depth=3,
    ),
    "1b": Size(
        teacher=_llama(128256, 2048, 8192, 16, 32, 8),  # Llama 3.2 1B, untied
        student=_llama(128256, 1024, 4096, 8, 16, 8),
        rows=8,
        length=512,
        steps=10,
        warm_up=3,
        prompts=2,
        prompt_tokens=64,
        new_tokens=128,
        repeats=2,
        depth=7,
    ),
}
