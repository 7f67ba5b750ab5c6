"""The keys and values of a target in storage that is written, and compacted, in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

SMALLEST = 256
"""Slots of the first storage; it doubles whenever it is full."""


class KVCache(Cache):
    """Storage [B, heads, capacity, width] for each layer, of which ``length`` slots are in use.

    A pass writes behind the slots in use; whoever runs it then says how many it keeps, by
    setting ``length``. Layers with a sliding window keep everything: their masks do the sliding.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Called by a layer with [B, heads, A, width]; returns its slots in use and the A new."""
        if layer_idx == len(self.keys):
            self.keys.append(key_states[:, :, :0])
            self.values.append(value_states[:, :, :0])
        start, end = self.length, self.length + key_states.shape[2]
        self.keys[layer_idx] = keys = with_room(self.keys[layer_idx], end)
        self.values[layer_idx] = values = with_room(self.values[layer_idx], end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use, the same in every layer."""
        return self.length

    def leave(self, slots: int) -> None:
        """Put zeros into so many slots behind those in use, which count as used from then on."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            self.update(_zeros(keys, slots), _zeros(values, slots), layer)
        self.length += slots

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` [B, M] to slots ``target`` [B, M], each row its own."""
        for storage in (*self.keys, *self.values):
            _, heads, _, width = storage.shape
            moved = storage.gather(2, source[:, None, :, None].expand(-1, heads, -1, width))
            storage.scatter_(2, target[:, None, :, None].expand(-1, heads, -1, width), moved)


def with_room(storage: Tensor, slots: int) -> Tensor:
    """The storage, or a larger one with its contents."""
    rows, heads, capacity, width = storage.shape
    if slots <= capacity:
        return storage
    larger = storage.new_empty(rows, heads, max(slots, 2 * capacity, SMALLEST), width)
    larger[:, :, :capacity] = storage
    return larger


def _zeros(storage: Tensor, slots: int) -> Tensor:
    rows, heads, _, width = storage.shape
    return storage.new_zeros(rows, heads, slots, width)
