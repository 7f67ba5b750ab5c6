"""A GGUF file of a target, with the layout that llama.cpp's own converter gives it.

The file has no tokenizer, because a baseline reads and returns token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor
from transformers import PreTrainedModel

from kdcore import UserError

FORMAT = 1
"""Raise it when the same target gives another file."""
CURE = "set gguf of the baseline llama_cpp to a file that llama.cpp's converter made of the target"


@dataclass(frozen=True, slots=True)
class _Family:
    """How llama.cpp sees a model family.

    Attributes:
        architecture: Its architecture.
        interleaved: Whether it rotates neighbouring elements of a query or key, where
            transformers rotates an element of the first half with one of the second.
    """

    architecture: gguf.MODEL_ARCH
    interleaved: bool


FAMILIES = {
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": _Family(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3, False),
}
"""By model_type of the config. Their files need no number beyond those of `_describe`."""


def write_gguf(target: PreTrainedModel, weights: str, path: Path) -> None:
    """Write the weights of a target to a GGUF file.

    Args:
        target: The target.
        weights: Dtype of the matrices: ``float32``, ``float16`` or ``bfloat16``.
        path: The new file.

    Raises:
        UserError: The target is not of a family that this function knows, has a setting that the
            file would not say, or a tensor without a place in it.
    """
    config: Any = target.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _unwritable(config.model_type, f"it is not one of {', '.join(FAMILIES)}")
    _refuse_other_settings(config)
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
    _describe(writer, config)
    stored = gguf.GGMLQuantizationType[{"float32": "F32", "float16": "F16"}.get(weights, "BF16")]
    for name, tensor in _tensors(target).items():
        new = names.get_name(name, (".weight", ".bias"))
        if new is None:
            raise _unwritable(config.model_type, f"{name} has no place in the file")
        values = tensor.detach().float().cpu()
        if family.interleaved and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleaved(values, heads)
        kind = stored if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(new, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _refuse_other_settings(config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise _unwritable(config.model_type, f"its rotary positions are {rope['rope_type']}")
    if config.hidden_act != "silu":
        raise _unwritable(config.model_type, f"its activation is {config.hidden_act}")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windows or (config.model_type == "mistral" and config.sliding_window is not None):
        raise _unwritable(config.model_type, "its layers have a sliding window")


def _tensors(target: PreTrainedModel) -> Mapping[str, Tensor]:
    """The parameters; a head that is the matrix of the embeddings is not among them."""
    return dict(target.named_parameters())


def _interleaved(matrix: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: element i of the second half follows that of the first."""
    halves = matrix.reshape(heads, 2, -1, *matrix.shape[1:])
    return halves.transpose(1, 2).reshape(matrix.shape)


def _unwritable(model_type: str, reason: str) -> UserError:
    return UserError(f"cannot write a GGUF file of a {model_type}: {reason}", CURE)
