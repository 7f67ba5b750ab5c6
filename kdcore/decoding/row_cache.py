"""A drafter's keys and values of committed tokens: B rows, each appended to at its own length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.decoding.decoder_layer import Attend, LayerSize

SMALLEST = 256
"""Slots of the first storage; it doubles whenever it is full."""


class RowCache:
    """Storage [B, capacity, key heads, W] for each layer; slot s of a row holds its entry s.

    ``lengths``: [B] int64, how many entries each row has. A pass writes behind them, its padding
    too: what lies above a row's length is free.
    """

    def __init__(self, rows: int, layers: int, size: LayerSize, like: Tensor) -> None:
        """like: a tensor of the drafter's device and dtype."""
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.storage = [like.new_empty(2, rows, 0, size.key_heads, size.head)] * layers

    def positions(self, count: int) -> Tensor:
        """[B, A] the entries that ``count`` = A more of each row will be."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def reading(self, positions: Tensor) -> Iterator[Attend]:
        """For each layer, an attention that writes entries ``positions``, and reads up to each."""
        shortest, longest = map(int, self.lengths.aminmax())
        count = positions.shape[1]
        # One row, or rows of one length, need no scatter; one entry each, or the first, no mask.
        together = slice(longest, longest + count) if shortest == longest else None
        seen: Tensor | None = None
        if longest and (count > 1 or together is None):
            slots = torch.arange(longest + count, device=positions.device)
            seen = (slots <= positions[:, :, None])[:, None]
        for layer in range(len(self.storage)):
            self._make_room(layer, longest + count)
            yield partial(self._attend, layer, positions, together, longest + count, seen)

    def _attend(
        self,
        layer: int,
        positions: Tensor,
        together: slice | None,
        end: int,
        seen: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        storage = self.storage[layer]
        new = torch.stack([key, value]).transpose(2, 3)
        if together is not None:
            storage[:, :, together] = new
        else:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            storage[:, rows, positions] = new
        keys, values = storage[:, :, :end].transpose(2, 3)
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=seen,
            is_causal=seen is None and query.shape[2] > 1,
            enable_gqa=True,
        )

    def _make_room(self, layer: int, slots: int) -> None:
        storage = self.storage[layer]
        pair, rows, capacity, heads, width = storage.shape
        if slots > capacity:
            larger = storage.new_zeros(pair, rows, max(slots, 2 * capacity, SMALLEST), heads, width)
            larger[:, :, :capacity] = storage
            self.storage[layer] = larger
