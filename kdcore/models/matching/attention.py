"""Queries, keys and values of selected layers, captured while transformers computes attention.

The attention ``sdpa`` never has the matrix of the weights. Its queries and keys, after rotation and
norms, have all that the weights depend on, in every family that calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdcore.errors import UserError
from kdcore.models.anatomy import layers_of
from kdcore.models.matching.layers import LayerAttention

SDPA = "sdpa"
WATCHED = "kdcore_watched"
"""The registered name of `watched` in transformers."""

_this = threading.local()  # other threads may run the same model meanwhile


class AttentionTap:
    """Capture of the attention of some of a model's layers.

    Args:
        model: A model that `refuse_unwatched` does not refuse.
        layers: Numbers of the layers, from 1.
        values: Whether the values are kept too, which nothing else needs of a teacher.
    """

    def __init__(self, model: Any, layers: tuple[int, ...], *, values: bool) -> None:
        blocks = layers_of(model)
        self.layers, self._values = layers, values
        self._config = model.config.get_text_config()
        self._name = type(model).__name__
        self._numbers = {
            module: number for number in layers for module in blocks[number - 1].modules()
        }

    @contextmanager
    def listening(self) -> Iterator[dict[int, LayerAttention]]:
        """Capture the pass that this thread runs inside the context.

        Yields:
            Number of a layer -> its attention, filled by the pass.

        Raises:
            UserError: A layer computed its attention without calling ``sdpa`` of transformers.
        """
        heard: dict[int, LayerAttention] = {}
        before = self._config._attn_implementation
        self._config._attn_implementation = WATCHED
        _this.numbers, _this.heard, _this.values = self._numbers, heard, self._values
        try:
            yield heard
        finally:
            self._config._attn_implementation = before
            _this.heard = None
        for number in (number for number in self.layers if number not in heard):
            raise _unwatched(self._name, f"layer {number} computes it in a way of its own")


def watched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers, which is called in the same way; a tap may note its arguments.

    Args:
        module: The attention module.
        query: [P, heads, L, W] queries.
        key: [P, key heads, L, W] keys.
        value: [P, key heads, L, W] values.
        attention_mask: [P or 1, 1, L, L] mask, or None.
        dropout: Dropout rate.
        scaling: Scale of the scores.
        is_causal: Whether a query sees no later key, without a mask; None: the module says so.
        **kwargs: Further arguments of ``sdpa``.

    Returns:
        [P, L, heads, W], and None for the attention weights.
    """
    number = getattr(_this, "numbers", {}).get(module)
    heard = getattr(_this, "heard", None)
    if heard is not None and number is not None and kwargs.get("position_bias") is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kept = value if _this.values else None
        heard[number] = LayerAttention(query, key, attention_mask, causal, scale, kept)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def refuse_unwatched(model: Any, role: str, layers: Collection[int] = ()) -> None:
    """Check, without weights, that the attention of a model can be captured.

    Args:
        model: The model.
        role: Its section in the spec, e.g. teacher.
        layers: Numbers from 1 of the layers that a matcher compares, once it is bound.

    Raises:
        UserError: A layer without attention, another attention than ``sdpa``, or one of its own.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, name = plain.config.get_text_config(), f"the {role} ({type(plain).__name__})"
    if not getattr(config, "num_hidden_layers", 0):
        raise _unwatched(name, "its stages do not have a common list of layers")
    having = {
        number
        for number, block in enumerate(layers_of(model), start=1)
        if any("attention" in type(each).__name__.lower() for each in block.modules())
    }
    if not having:
        raise _unwatched(name, "its layers do not have attention")
    for number in sorted(set(layers) - having):
        raise _unwatched(name, f"layer {number} does not have attention")
    if not plain._supports_attention_backend:
        raise _unwatched(name, "it computes its attention in a way of its own")
    if config._attn_implementation != SDPA:
        raise other_attention(name, config._attn_implementation, role)


def other_attention(name: str, implementation: str, role: str) -> UserError:
    """The error of a model whose attention is not ``sdpa``.

    Args:
        name: What the message calls the model.
        implementation: Its attention.
        role: Its section in the spec.

    Returns:
        The error to raise.
    """
    return UserError(
        f"a matcher of attention needs attention: sdpa, and {name} has {implementation}",
        f"set {role}.attention: sdpa; if the model does not support it, remove the matcher",
        "method.matchers",
    )


def _unwatched(name: str, why: str) -> UserError:
    return UserError(
        f"the attention of {name} cannot be compared: {why}",
        "choose a model whose layers have attention, such as Llama or BERT, or remove the matcher",
    )


AttentionInterface.register(WATCHED, watched)
AttentionMaskInterface.register(WATCHED, sdpa_mask)
