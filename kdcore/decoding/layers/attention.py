"""Attention masks of draft trees, and grouped-query attention without copies.

transformers copies keys and values for each query head whenever a pass has a mask and more than one
token; at a thousand slots, that takes as long as reading all of the weights. The attention here
computes the same without copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdcore.errors import UserError

Masks: TypeAlias = Tensor | dict[str, Tensor]

GROUPED = "kdcore_grouped"
"""The registered name of `grouped` in transformers."""
IMPLEMENTATIONS = ("eager", "sdpa", GROUPED)
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")

_lock = threading.Lock()
_at_work: dict[int, int] = {}
"""The number of decodings that use `grouped`, by the id of the config in which it is set."""


class TreeAttention:
    """The 4D masks of one model, for each type of its layers.

    Args:
        model: A causal language model.

    Raises:
        UserError: The attention of the model does not accept a 4D mask, or its layers have a state
            that cannot be rolled back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = config = model.config.get_text_config()
        self.layer_types = getattr(config, "layer_types", None)
        self.window: int | None = getattr(config, "sliding_window", None)
        self._model = model
        only = FULL if self.window is None else SLIDING
        self.kinds: tuple[str, ...] = tuple(dict.fromkeys(self.layer_types or (only,)))
        implementation = config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"attention '{implementation}' does not accept the mask of a draft tree",
                "load the model with attn_implementation set to eager or sdpa",
            )
        odd = {kind for kind in self.layer_types or () if kind not in LAYER_TYPES}
        if getattr(config, "attention_chunk_size", None) is not None:
            odd.add("chunked_attention")
        if model._is_stateful and not set(self.layer_types or ["recurrent"]) <= set(LAYER_TYPES):
            odd.add("recurrent")  # and not a hybrid family's model without its recurrent layers
        if odd:
            raise UserError(
                f"{type(model).__name__} has layers of type {', '.join(sorted(odd))}, whose state "
                "cannot follow a draft tree",
                f"choose a model whose layers are all of type {' or '.join(LAYER_TYPES)}",
            )

    def __call__(
        self, sees: Tensor, positions: Tensor, slot_positions: Tensor
    ) -> dict[str, Tensor]:
        """Build the masks of a pass.

        Args:
            sees: [B, A, S] bool, whether the slot's token is an ancestor of the token or itself.
            positions: [B, A] positions of the tokens.
            slot_positions: [B, S] positions of the slots' tokens.

        Returns:
            The mask [B, A, S] bool of each type of the target's layers.
        """
        if self.window is None:
            return dict.fromkeys(self.kinds, sees)
        near = sees & (positions[:, :, None] - slot_positions[:, None, :] < self.window)
        return {kind: near if kind == SLIDING else sees for kind in self.kinds}

    def causal(self, positions: Tensor) -> dict[str, Tensor]:
        """Build the masks of a first pass, in which each token sees those before it.

        Args:
            positions: [B, A] positions of the tokens.

        Returns:
            The mask [B, A, A] bool of each type of the target's layers.
        """
        rows, count = positions.shape
        sees = torch.ones(count, count, dtype=torch.bool, device=positions.device).tril()
        return self(sees.expand(rows, -1, -1), positions, positions)

    def taken(self, masks: Mapping[str, Tensor]) -> Masks:
        """Convert masks to the form that the model reads.

        Args:
            masks: The mask [B, A, S] bool of each type of layers.

        Returns:
            Additive masks [B, 1, A, S], as a dict by layer type if the model has one; sdpa would
            convert a bool mask in every layer.
        """
        hidden = torch.finfo(self.dtype).min
        ready = {
            kind: torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(
                ~seen, hidden
            )[:, None]
            for kind, seen in masks.items()
        }
        return ready if self.layer_types is not None else next(iter(ready.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self._model.dtype

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Replace the attention ``sdpa`` by `grouped` inside the context.

        The config, which all threads share, returns to ``sdpa`` when the last context ends.
        """
        key = id(self.config)
        with _lock:
            replaced = self.config._attn_implementation in ("sdpa", GROUPED)
            if replaced:
                self.config._attn_implementation = GROUPED
                _at_work[key] = _at_work.get(key, 0) + 1
        try:
            yield
        finally:
            with _lock:
                if replaced:
                    _at_work[key] -= 1
                if replaced and not _at_work[key]:
                    del _at_work[key]
                    self.config._attn_implementation = "sdpa"


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend_grouped` with the interface of ``sdpa`` in transformers.

    Args:
        module: The attention module.
        query: [B, heads, A, W] queries.
        key: [B, key heads, S, W] keys.
        value: [B, key heads, S, W] values.
        attention_mask: [B, 1, A, S] additive mask, or None.
        dropout: Dropout rate.
        scaling: Scale of the scores.
        **kwargs: Further arguments of ``sdpa``.

    Returns:
        [B, A, heads, W], and None for the attention weights.
    """
    if kwargs.get("position_bias") is not None or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    read = attend_grouped(query, key, value, attention_mask, scaling)
    return read.transpose(1, 2).contiguous(), None


def attend_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Grouped-query attention without copies of the shared keys and values.

    The queries of a group are treated as further tokens of one head.

    Args:
        query: [B, heads, A, W] queries.
        key: [B, key heads, S, W] keys.
        value: [B, key heads, S, W] values.
        mask: [B, 1 or heads, A, S], bool or additive; None for causal attention with A = S.
        scaling: Scale of the scores (default: 1 / sqrt(W)).

    Returns:
        [B, heads, A, W].
    """
    rows, heads, count, width = query.shape
    groups = heads // key.shape[1]
    if mask is None or groups == 1 or mask.shape[1] != 1:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            scale=scaling,
            enable_gqa=groups > 1,
        )
    read = F.scaled_dot_product_attention(
        query.reshape(rows, -1, groups * count, width),
        key,
        value,
        attn_mask=mask.expand(-1, groups, -1, -1).flatten(1, 2)[:, None],
        scale=scaling,
    )
    return read.view(rows, heads, count, -1)


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
