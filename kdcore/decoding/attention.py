"""Which slots of the cache each token of a pass may attend to, in the form the model takes."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.errors import UserError

Masks: TypeAlias = Tensor | dict[str, Tensor]

IMPLEMENTATIONS = ("eager", "sdpa")
LAYER_TYPES = ("full_attention", "sliding_attention")


class TreeAttention:
    """Makes 4D masks for one model, one for each type of its layers.

    Raises UserError when the model's attention takes no 4D mask, or its layers keep a state that
    cannot be rolled back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
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

    @staticmethod
    def _as_taken(seen: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, A, S], added to the scores; sdpa converts a mask of bools in every layer."""
        hidden = torch.finfo(dtype).min
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, hidden)[:, None]
