"""The calls that differ between the supported versions of transformers."""

from __future__ import annotations

from typing import Any

import transformers


def dequantized() -> dict[str, Any]:
    """Arguments of ``from_pretrained(..., gguf_file=...)`` that give plain weights.

    transformers 5.16 always dequantises a GGUF file. From 5.17 on it leaves the weights in GGUF
    blocks unless `GgufConfig` says otherwise.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
