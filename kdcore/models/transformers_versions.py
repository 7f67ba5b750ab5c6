"""The calls that differ between the supported versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

CACHES = "cache", "past_key_values"
"""Names of the argument that takes the cache of keys and values: from 5.24 on, and before it."""


def dequantized() -> dict[str, Any]:
    """Arguments of ``from_pretrained(..., gguf_file=...)`` that give plain weights.

    transformers 5.16 always dequantises a GGUF file. From 5.17 on it leaves the weights in GGUF
    blocks unless `GgufConfig` says otherwise.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def cache_argument(model: Any) -> str:
    """The name of the argument by which a model takes a cache of keys and values.

    A model with code of its own keeps the name that this code has.

    Args:
        model: The transformers model, without a wrapper around it.

    Returns:
        The name; of a model that takes no such cache, one that its ``forward`` lacks.
    """
    taken = inspect.signature(model.forward).parameters
    own = "dict" in str(taken["cache"].annotation) if "cache" in taken else False  # XLM
    known = next((name for name in CACHES if name in taken), CACHES[0])
    return CACHES[1] if own else known
