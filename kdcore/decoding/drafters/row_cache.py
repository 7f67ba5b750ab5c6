"""A cache of a drafter's keys and values, in which each row grows at its own length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.decoding.layers.attention import attend_grouped
from kdcore.decoding.layers.decoder_layer import Attend, LayerSize

Write: TypeAlias = Callable[[Tensor, Tensor], None]
"""A function that stores rotated keys and values [B, key heads, A, W] of new entries."""

SMALLEST = 256
"""Initial capacity in slots; it doubles whenever the storage is full."""

RECOUNT = 64
"""Number of new entries after which the host asks an accelerator for the longest row again."""


class RowCache:
    """Storage [2, B, capacity, key heads, W] for each layer; slot s of a row contains its entry s.

    A pass writes after the entries of a row, including its padding: all slots above a row's length
    are free. The drafter adds the number of real entries to ``lengths`` after the pass.

    Args:
        rows: Number of rows B.
        layers: Number of layers.
        size: Sizes of the layers.
        like: A tensor with the drafter's device and dtype.

    Attributes:
        lengths: [B] int64, number of entries of each row, at most ``A`` more after a pass over A.
        storage: Keys and values of each layer.
    """

    def __init__(self, rows: int, layers: int, size: LayerSize, like: Tensor) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.storage = [like.new_empty(2, rows, 0, size.key_heads, size.head)] * layers
        self._bound = self._appended = 0

    @classmethod
    def join(cls, caches: Sequence[RowCache]) -> RowCache:
        """Concatenate the rows of caches.

        Args:
            caches: At least one cache.

        Returns:
            A copy with all rows; for a single cache, that cache itself.
        """
        if len(caches) == 1:
            return caches[0]
        lengths = torch.cat([each.lengths for each in caches])
        longest = int(lengths.max())
        layers = zip(*(each.storage for each in caches), strict=True)
        storage = [torch.cat([_fit(x, longest) for x in same], 1) for same in layers]
        return cls._of(lengths, storage, longest)

    def split(self) -> list[RowCache]:
        """Split into one cache per row; these share the storage until they or this one grows."""
        rows = [slice(row, row + 1) for row in range(len(self.lengths))]
        return [
            self._of(self.lengths[row], [x[:, row] for x in self.storage], self._bound)
            for row in rows
        ]

    @classmethod
    def _of(cls, lengths: Tensor, storage: list[Tensor], bound: int) -> RowCache:
        cache = cls.__new__(cls)
        cache.lengths, cache.storage = lengths, storage
        cache._bound, cache._appended = bound, 0
        return cache

    def positions(self, count: int) -> Tensor:
        """The positions of the next entries.

        Args:
            count: Number A of new entries of each row.

        Returns:
            [B, A] int64.
        """
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def reading(self, positions: Tensor) -> Iterator[Attend]:
        """Attention of new entries, which each read the entries up to their own.

        Args:
            positions: [B, A] int64 positions at which the new entries are written.

        Yields:
            An `Attend` for each layer.
        """
        count = positions.shape[1]
        together, end = self._slots_of(positions)
        seen: Tensor | None = None
        # A single entry, or the first ones, need no mask.
        if end > count and (count > 1 or together is None):
            slots = torch.arange(end, device=positions.device)
            seen = (slots <= positions[:, :, None])[:, None]
        return self._attends(positions, together, end, seen)

    def writing(self, positions: Tensor) -> Iterator[Write]:
        """Storage of new entries that read nothing themselves.

        Args:
            positions: [B, A] int64 positions at which the new entries are written.

        Yields:
            A `Write` for each layer.
        """
        together, end = self._slots_of(positions)
        for layer in range(len(self.storage)):
            self._make_room(layer, end)
            yield partial(self._write, layer, positions, together)

    def drafting(self, sees: Tensor) -> Iterator[Attend]:
        """Attention of drafts, which are written temporarily after the entries of a row.

        Drafts read all entries of their row. The next entries overwrite them.

        Args:
            sees: [B, A, S] bool, the mask of A new drafts over all S drafts, themselves included.

        Yields:
            An `Attend` for each layer.
        """
        shortest, longest = self._extent()
        count, drafts = sees.shape[1:]
        start, end = longest + drafts - count, longest + drafts
        place = torch.arange(end, device=sees.device) - self.lengths[:, None]
        known = place.clamp(0, drafts - 1)[:, None].expand(-1, count, -1)
        read = sees.gather(2, known) & (place < drafts)[:, None]
        return self._attends(
            self.lengths[:, None] + torch.arange(drafts - count, drafts, device=sees.device),
            slice(start, end) if shortest == longest else None,
            end,
            (read | (place < 0)[:, None])[:, None],
        )

    def _slots_of(self, positions: Tensor) -> tuple[slice | None, int]:
        """Slots of new entries if they are the same in all rows, and the end of the longest row."""
        count = positions.shape[1]
        shortest, longest = self._extent()
        self._bound, self._appended = longest + count, self._appended + count
        end = longest + count
        return slice(longest, end) if shortest == longest else None, end

    def _extent(self) -> tuple[int, int]:
        """Bounds on the lengths of the shortest and the longest row.

        On a CPU they are exact. Elsewhere the host would wait for the device, so it does that only
        once in a while, and counts the new entries in between; padding makes the bound too large.
        """
        if self.lengths.device.type == "cpu":
            shortest, longest = map(int, self.lengths.aminmax())
            return shortest, longest
        if self._appended >= RECOUNT:
            self._bound, self._appended = int(self.lengths.max()), 0
        return 0, self._bound

    def _attends(
        self, slots: Tensor, together: slice | None, end: int, seen: Tensor | None
    ) -> Iterator[Attend]:
        for layer in range(len(self.storage)):
            self._make_room(layer, end)
            yield partial(self._attend, layer, slots, together, end, seen)

    def _attend(
        self,
        layer: int,
        slots: Tensor,
        together: slice | None,
        end: int,
        seen: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        self._write(layer, slots, together, key, value)
        keys, values = self.storage[layer][:, :, :end].transpose(2, 3)
        return attend_grouped(query, keys, values, seen, None)

    def _write(
        self, layer: int, slots: Tensor, together: slice | None, key: Tensor, value: Tensor
    ) -> None:
        new = torch.stack([key, value]).transpose(2, 3)
        if together is not None:
            self.storage[layer][:, :, together] = new
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            self.storage[layer][:, rows, slots] = new

    def _make_room(self, layer: int, slots: int) -> None:
        storage = self.storage[layer]
        capacity = storage.shape[2]
        if slots > capacity:
            self.storage[layer] = _fit(storage, max(slots, 2 * capacity, SMALLEST))


def _fit(storage: Tensor, slots: int) -> Tensor:
    """The first ``slots`` of a layer's storage, padded with zeros."""
    return F.pad(storage[:, :, :slots], (0, 0, 0, 0, 0, max(0, slots - storage.shape[2])))
