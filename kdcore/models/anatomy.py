"""Anatomy of a model family: the places of its parts, and the config names of its sizes.

Support for a family that keeps its layers, head or positions elsewhere belongs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.errors import UserError
from kdcore.method.logits import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(model: Any) -> nn.Module | None:
    """The body of a causal language model, whose output the head reads.

    Args:
        model: The model, or a peft model around it.

    Returns:
        The decoder; None when the model does not have one of its own.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else None
    return decoder if decoder is not plain else None


def head_of(model: Any) -> Callable[[], Head] | None:
    """A function that returns a model's linear head.

    Args:
        model: A causal language model or a classifier.

    Returns:
        A function that reads the head anew at each call, since its weight may be tied, sharded or
        replaced; None when the model does not have a linear head.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Linear):
        return None
    config = model.config.get_text_config()  # a multimodal model has these fields there
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return lambda: Head(module.weight, module.bias, scale, cap)


def layer_count(model: PreTrainedModel) -> int:
    """The number L of decoder layers of a language model."""
    return int(model.config.get_text_config().num_hidden_layers)


def context_of(model: Any) -> int | None:
    """The context length of a model in tokens.

    Args:
        model: A transformers model.

    Returns:
        The length of the longest row; None when the config states no limit, as for image models.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            if module.padding_idx is None:
                break
            # RoBERTa and its relatives start to count after the padding index
            return module.num_embeddings - module.padding_idx - 1
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet's -1 means no limit


def short_length_of(model: Any) -> int | None:
    """The number of positions for which LongRoPE uses its short factors.

    transformers chooses the factors for a whole forward pass, by its last position. A pass beyond
    this length uses the long factors, which do not fit the keys that earlier passes cached with
    the short ones.

    Args:
        model: A transformers model.

    Returns:
        The length in tokens; None for a model without LongRoPE.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layers = [each for each in rope.values() if isinstance(each, dict)]
    return min(
        (
            each["original_max_position_embeddings"]
            for each in by_layers or [rope]
            if each.get("rope_type") == "longrope"
        ),
        default=None,
    )


def final_scale(target: PreTrainedModel) -> Tensor:
    """The scale of the target's final norm.

    It is measured by calling the norm: some families store the weight minus one, and a layer norm
    adds a bias.

    Args:
        target: The target model.

    Returns:
        [H] float32 factors; ones when the target does not have a final norm.
    """
    decoder: nn.Module = target.get_decoder()  # type: ignore[no-untyped-call]
    hidden = target.config.get_text_config().hidden_size
    # Gemma 3n and 4 have another norm after the final one, of a projection with another width.
    norms = [
        part
        for part in decoder.children()
        if "Norm" in type(part).__name__ and all(w.shape == (hidden,) for w in part.parameters())
    ]
    # Mean 0 and mean square 1: normalisation leaves it unchanged, and only the scale acts.
    signs = torch.ones(hidden, device=target.device, dtype=target.dtype)
    signs[1::2] = -1
    if not norms:
        return torch.ones_like(signs, dtype=torch.float32)
    with torch.no_grad():
        scaled: Tensor = norms[-1](signs).float() - norms[-1](-signs).float()
        return scaled / 2 * signs.float()


def layers_of(model: Any) -> nn.ModuleList:
    """The L decoder layers of a language model.

    Args:
        model: A causal language model.

    Returns:
        The model's own list of its layers.

    Raises:
        UserError: The decoder does not keep its layers in one list.
    """
    count = layer_count(model)
    for part in model.get_decoder().modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise UserError(
        f"cannot find the {count} layers of {type(model).__name__}",
        "choose a model that keeps its layers in one list, such as Llama or GPT-2",
    )


USUAL_HEAD = 64
"""The head width assumed for a target without attention, such as Mamba."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The sizes of a language model's layers; a size that it does not have gets the usual value.

    Attributes:
        hidden: Width H of a hidden state.
        feed_forward: Width inside the gated MLP.
        heads: Number of query heads.
        key_heads: Number of key and value heads.
        head: Width of a head.
        eps: Epsilon of the norms.
        theta: Base of RoPE's frequencies.
    """

    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head: int
    eps: float
    theta: float


def layer_facts(model: Any) -> LayerFacts:
    """The layer sizes from a model's config."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    heads = _size(config, "num_attention_heads") or max(1, hidden // USUAL_HEAD)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}  # Gemma 3 has one entry for each layer type
    return LayerFacts(
        hidden=hidden,
        feed_forward=_size(config, "intermediate_size") or 4 * hidden,
        heads=heads,
        key_heads=_size(config, "num_key_value_heads") or heads,
        head=_size(config, "head_dim") or hidden // heads,
        eps=getattr(config, "rms_norm_eps", 1e-6),
        theta=rope.get("rope_theta", 10000.0),
    )


def _size(config: Any, name: str) -> int | None:
    """A size that all layers share; None when it is missing or differs between layers."""
    try:
        size = getattr(config, name, None)
    except RuntimeError:  # transformers raises this when the layers differ
        return None
    return size if isinstance(size, int) else None
