"""A cache of keys and values with addresses and shapes that stay the same from pass to pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._dynamo import mark_static_address

from kdcore.decoding.engines.cache import SMALLEST, KVCache, with_room


class StaticCache(KVCache):
    """Storage whose addresses and shapes stay the same from pass to pass.

    Attributes:
        rows: Number of rows B of the storage; those in use come first.
        places: [A] int64 slots that a compiled pass writes; None in another pass, which writes
            after the slots in use.
        window: Number of slots S that a compiled pass reads.
    """

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__(recurring(slots, SMALLEST))
        self.rows = rows
        self.places: Tensor | None = None
        self.window = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of A tokens in one layer; see `KVCache.update`.

        Returns:
            Keys and values of the slots in use and the new ones; in a compiled pass, those of the
            window [B, heads, S, width].
        """
        if layer_idx == len(self.keys):
            for layers, states in ((self.keys, key_states), (self.values, value_states)):
                rows, heads, _, width = states.shape
                layers.append(_fixed(states.new_zeros(rows, heads, self.expected, width)))
        if self.places is None:
            return super().update(key_states, value_states, layer_idx)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.places, key_states)
        values.index_copy_(2, self.places, value_states)
        return keys[:, :, : self.window], values[:, :, : self.window]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of slots in use; 0 in a compiled pass, to which each number is a new shape."""
        return 0 if self.places is not None else self.length

    def reserve(self, slots: int) -> None:
        """Enlarge the storage if it has fewer slots.

        Args:
            slots: Required capacity.
        """
        self.expected = max(self.expected, recurring(slots, SMALLEST))
        for layers in (self.keys, self.values):
            for layer, storage in enumerate(layers):
                layers[layer] = enlarged(storage, self.expected)

    def select(self, rows: Tensor) -> None:
        """Move some rows to the front; the storage shrinks once half of it suffices.

        Args:
            rows: [R] rows that remain, in their new order.
        """
        smaller = 2 * len(rows) <= self.rows
        for layers in (self.keys, self.values):
            for layer, storage in enumerate(layers):
                kept = storage[rows]
                if smaller:
                    layers[layer] = _fixed(kept)
                else:
                    storage[: len(rows)] = kept
        if smaller:
            self.rows = len(rows)


def recurring(size: int, least: int = 1) -> int:
    """Round a size up to a power of two.

    Args:
        size: The size, at least 0.
        least: Minimum of the result, a power of two.

    Returns:
        The smallest such power.
    """
    return max(least, 1 << max(size - 1, 0).bit_length())


def enlarged(storage: Tensor, slots: int) -> Tensor:
    """Storage with at least the given capacity, whose address stays the same.

    Args:
        storage: [B, heads, capacity, width].
        slots: Required capacity.

    Returns:
        The same storage, or a larger one with its contents and zeros after them.
    """
    larger = with_room(storage, slots)
    if larger is not storage:
        larger[:, :, storage.shape[2] :] = 0  # hidden, but a NaN would show
        _fixed(larger)
    return larger


def _fixed(storage: Tensor) -> Tensor:
    """Tell torch that a storage stays where it is, so that a CUDA graph may write into it."""
    mark_static_address(storage)
    return storage
