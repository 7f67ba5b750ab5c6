"""Which slots of the cache each token of a pass may attend to, in the form the model takes.

And how they are attended to: as ``sdpa`` does, but for query heads that share keys and values.
transformers copies those for each query head whenever a pass has a mask and more than one token,
which takes as long as reading all of the weights does at a thousand slots.
"""

from __future__ import annotations

from collections.abc import Iterator
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

IMPLEMENTATIONS = ("eager", "sdpa")
LAYER_TYPES = ("full_attention", "sliding_attention")


GROUPED = "kdcore_grouped"
"""The name by which transformers knows `grouped`."""


class TreeAttention:
    """Makes 4D masks for one model, one for each type of its layers.

    Raises UserError when the model's attention takes no 4D mask, or its layers keep a state that
    cannot be rolled back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = config = model.config.get_text_config()
        self.layer_types = getattr(config, "layer_types", None)
        self.window: int | None = getattr(config, "sliding_window", None)
        implementation = config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"attention '{implementation}' takes no mask of a draft tree",
                f"load the model with attn_implementation set to {' or '.join(IMPLEMENTATIONS)}",
            )
        odd = {kind for kind in self.layer_types or () if kind not in LAYER_TYPES}
        if getattr(config, "attention_chunk_size", None) is not None:
            odd.add("chunked_attention")
        if model._is_stateful:
            odd.add("recurrent")
        if odd:
            raise UserError(
                f"{type(model).__name__} has layers of type {', '.join(sorted(odd))}, whose state "
                "cannot follow a draft tree",
                f"choose a model whose layers are all of type {' or '.join(LAYER_TYPES)}",
            )

    def __call__(
        self, sees: Tensor, positions: Tensor, slot_positions: Tensor, dtype: torch.dtype
    ) -> Masks:
        """Masks [B, 1, A, S], keyed by layer type where the model has several.

        sees: [B, A, S] bool, whether the token is or follows what is in the slot.
        positions: [B, A] of the tokens; slot_positions: [B, S] of what is in the slots.
        dtype: of the hidden states.
        """
        near = sees
        if self.window is not None:
            near = sees & (positions[:, :, None] - slot_positions[:, None, :] < self.window)
        if self.layer_types is None:
            return self._as_taken(near, dtype)
        return {
            kind: self._as_taken(near if kind == "sliding_attention" else sees, dtype)
            for kind in set(self.layer_types)
        }

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, a model that attends by ``sdpa`` does so by `grouped`."""
        kept = self.config._attn_implementation
        if kept != "sdpa":
            yield
            return
        self.config._attn_implementation = GROUPED
        try:
            yield
        finally:
            self.config._attn_implementation = kept

    @staticmethod
    def _as_taken(seen: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, A, S], added to the scores; sdpa converts a mask of bools in every layer."""
        hidden = torch.finfo(dtype).min
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, hidden)[:, None]


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
    """`attend_grouped` behind the interface of transformers' ``sdpa``.

    Returns [B, A, heads, W], and no weights.
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
    """What queries read from keys and values that they share in groups, which are not copied.

    A group's queries are taken as so many more tokens of one head.

    query: [B, heads, A, W]; key, value: [B, key heads, S, W]; mask: [B, 1 or heads, A, S], bool or
    added to the scores; None when the tokens are the S themselves, each to read those up to it.
    Returns [B, heads, A, W].
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
