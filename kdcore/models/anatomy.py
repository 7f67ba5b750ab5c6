"""What must be known of a model family: where its parts are, and what its config calls them.

A family that keeps its layers, its head or its positions elsewhere is added here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.errors import UserError
from kdcore.method.logits import Head


def decoder_of(model: Any) -> nn.Module | None:
    """The body of a causal language model, whose output is what the head reads."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else None
    return decoder if decoder is not plain else None


def head_of(model: Any) -> Callable[[], Head] | None:
    """What gives a model's linear head; None when it has none, or another kind.

    It is read anew at each call, since its weight may be tied, sharded or replaced.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Linear):
        return None
    config = model.config.get_text_config()  # of a model of several kinds of input, it has these
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return lambda: Head(module.weight, module.bias, scale, cap)


def layer_count(model: PreTrainedModel) -> int:
    """L, how many decoder layers a language model has."""
    return int(model.config.get_text_config().num_hidden_layers)


def context_of(model: Any) -> int | None:
    """The longest row in tokens; None of models that name no limit, and of images and the like."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            if module.padding_idx is None:
                break
            # RoBERTa and its kin count from behind the padding's place
            return module.num_embeddings - module.padding_idx - 1
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet's -1 is no limit


def short_length_of(model: Any) -> int | None:
    """How many positions LongRoPE turns by its short factors; None of a model without LongRoPE.

    transformers chooses the factors for a whole pass, by its last position. A pass that reaches
    beyond this length turns what it reads by the long ones, and keys that were kept of passes
    before, turned by the short ones, do not fit it.
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
    """[H] what the target's final norm multiplies by; ones where it has none.

    Asked of the norm itself: its weight may be stored less one, and a layer norm adds a bias.
    """
    decoder: nn.Module = target.get_decoder()  # type: ignore[no-untyped-call]
    norms = [part for part in decoder.children() if "Norm" in type(part).__name__]
    hidden = target.config.get_text_config().hidden_size
    # Of mean 0 and mean square 1, so that any norm leaves it as it is before it multiplies.
    signs = torch.ones(hidden, device=target.device, dtype=target.dtype)
    signs[1::2] = -1
    if not norms:
        return torch.ones_like(signs, dtype=torch.float32)
    with torch.no_grad():
        scaled: Tensor = norms[-1](signs).float() - norms[-1](-signs).float()
        return scaled / 2 * signs.float()


def layers_of(model: Any) -> nn.ModuleList:
    """The L decoder layers of a language model.

    Raises:
        UserError: The decoder keeps them in no list of its own.
    """
    count = layer_count(model)
    for part in model.get_decoder().children():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise UserError(
        f"the {count} layers of {type(model).__name__} were not found",
        "choose a model that keeps its layers in one list, as Llama and GPT-2 do",
    )


USUAL_HEAD = 64
"""The width of a head, for a target without any, as Mamba."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The sizes of a language model's layers; where it has no such size, the usual one.

    Attributes:
        hidden: H, the width of a hidden state.
        feed_forward: The width inside the gated MLP.
        heads: Query heads.
        key_heads: Key and value heads.
        head: The width of a head.
        eps: The norms' epsilon.
        theta: The base of RoPE's frequencies.
    """

    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head: int
    eps: float
    theta: float


def layer_facts(model: Any) -> LayerFacts:
    """The sizes that a model's config gives."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    heads = _size(config, "num_attention_heads") or max(1, hidden // USUAL_HEAD)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}  # Gemma 3 has one for each type of layer
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
    """A size that all layers of a model share; None if they have none, or each its own."""
    try:
        size = getattr(config, name, None)
    except RuntimeError:  # so transformers refuses to name one of several
        return None
    return size if isinstance(size, int) else None
