"""A cache of a target's keys and values that is written and compacted in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

SMALLEST = 256
"""Initial capacity in slots, unless more are expected; it doubles whenever the storage is full."""


class KVCache(Cache):
    """Storage [B, heads, capacity, width] for each layer.

    A pass writes after the slots in use; its caller then adds the new slots to ``length``. Layers
    with a sliding window keep all slots: their masks implement the window.

    Args:
        expected: Number of slots to allocate at first.

    Attributes:
        length: Number of slots in use.
        keys: The keys of each layer.
        values: The values of each layer.
    """

    def __init__(self, expected: int = SMALLEST) -> None:
        super().__init__(layers=[])
        self.expected = expected
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
        """Write the keys and values of A new tokens in one layer.

        Args:
            key_states: [B, heads, A, width] new keys.
            value_states: [B, heads, A, width] new values.
            layer_idx: Index of the layer.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            Keys and values of the slots in use and the new ones, [B, heads, length + A, width]
            each.
        """
        if layer_idx == len(self.keys):
            self.keys.append(key_states[:, :, :0])
            self.values.append(value_states[:, :, :0])
        start, end = self.length, self.length + key_states.shape[2]
        self.keys[layer_idx] = keys = with_room(self.keys[layer_idx], end, self.expected)
        self.values[layer_idx] = values = with_room(self.values[layer_idx], end, self.expected)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of slots in use, which is the same in all layers."""
        return self.length

    def leave(self, slots: int) -> None:
        """Append zeros, as slots in use.

        Args:
            slots: Number of slots.
        """
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            self.update(_zeros(keys, slots), _zeros(values, slots), layer)
        self.length += slots

    def compact(self, slots: Tensor) -> None:
        """Keep some slots of each row, in the given order.

        Args:
            slots: [B, S'] slots that remain.
        """
        rows, count = slots.shape
        for storage in (*self.keys, *self.values):
            _, heads, _, width = storage.shape
            kept = storage.gather(2, slots[:, None, :, None].expand(rows, heads, count, width))
            storage[:, :, :count] = kept
        self.length = count

    def select(self, rows: Tensor) -> None:
        """Keep some rows.

        Args:
            rows: [R] rows that remain, in their new order.
        """
        for layers in (self.keys, self.values):
            for layer, storage in enumerate(layers):
                layers[layer] = storage[rows]


def with_room(storage: Tensor, slots: int, smallest: int = SMALLEST) -> Tensor:
    """Storage with at least the given capacity.

    Args:
        storage: [B, heads, capacity, width].
        slots: Required capacity.
        smallest: Minimum capacity of a larger storage.

    Returns:
        The same storage, or a larger one with its contents.
    """
    rows, heads, capacity, width = storage.shape
    if slots <= capacity:
        return storage
    larger = storage.new_empty(rows, heads, max(slots, 2 * capacity, smallest), width)
    larger[:, :, :capacity] = storage
    return larger


def _zeros(storage: Tensor, slots: int) -> Tensor:
    rows, heads, _, width = storage.shape
    return storage.new_zeros(rows, heads, slots, width)
