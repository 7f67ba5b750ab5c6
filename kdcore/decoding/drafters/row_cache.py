"""A drafter's keys and values of committed tokens: B rows, each appended to at its own length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.decoding.layers.attention import attend_grouped
from kdcore.decoding.layers.decoder_layer import Attend, LayerSize

SMALLEST = 256
"""Slots of the first storage; it doubles whenever it is full."""


class RowCache:
    """Keys and values of B rows; slot s of a row holds its entry s.

    A pass writes behind a row's entries, its padding too: what lies above a row's length is free.
    The drafter adds what was real to ``lengths`` after the pass.

    Args:
        rows: B, how many rows it has; all are empty.
        layers: How many layers write into it.
        size: The sizes of such a layer.
        like: [...] a tensor of the drafter's device and dtype.

    Attributes:
        lengths: [B] int64, how many entries each row has.
        storage: [2, B, capacity, key heads, W] for each layer, keys and then values.
    """

    def __init__(self, rows: int, layers: int, size: LayerSize, like: Tensor) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.storage = [like.new_empty(2, rows, 0, size.key_heads, size.head)] * layers

    @classmethod
    def join(cls, caches: Sequence[RowCache]) -> RowCache:
        """Put the rows of several caches into one.

        Args:
            caches: At least one, of the same layers.

        Returns:
            A copy; of a single cache, that one itself.
        """
        if len(caches) == 1:
            return caches[0]
        lengths = torch.cat([each.lengths for each in caches])
        longest = int(lengths.max())
        layers = zip(*(each.storage for each in caches), strict=True)
        return cls._of(lengths, [torch.cat([_fit(x, longest) for x in same], 1) for same in layers])

    def split(self) -> list[RowCache]:
        """Each row as a cache of its own, which reads this one's storage until either grows."""
        return [
            self._of(self.lengths[row : row + 1], [x[:, row : row + 1] for x in self.storage])
            for row in range(len(self.lengths))
        ]

    @classmethod
    def _of(cls, lengths: Tensor, storage: list[Tensor]) -> RowCache:
        cache = cls.__new__(cls)
        cache.lengths, cache.storage = lengths, storage
        return cache

    def positions(self, count: int) -> Tensor:
        """Number the next entries of each row.

        Args:
            count: A, how many more entries.

        Returns:
            [B, A] int64 positions, from each row's length on.
        """
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def reading(self, positions: Tensor) -> Iterator[Attend]:
        """Read committed entries: each sees those before it, and itself.

        Args:
            positions: [B, A] int64, the entries that the pass writes, as `positions` gives them.

        Yields:
            For each layer, an `Attend` that writes the entries and reads up to each.
        """
        shortest, longest = map(int, self.lengths.aminmax())
        count = positions.shape[1]
        # One row, or rows of one length, need no scatter; one entry each, or the first, no mask.
        together = slice(longest, longest + count) if shortest == longest else None
        seen: Tensor | None = None
        if longest and (count > 1 or together is None):
            slots = torch.arange(longest + count, device=positions.device)
            seen = (slots <= positions[:, :, None])[:, None]
        return self._attends(positions, together, longest + count, seen)

    def drafting(self, sees: Tensor) -> Iterator[Attend]:
        """Read drafts, which stand behind a row's entries until the next entries replace them.

        Args:
            sees: [B, A, S] bool, for A more drafts behind the S - A that stand there, which of all
                S they read, themselves included, beside every entry of their row.

        Yields:
            For each layer, an `Attend` that writes the A drafts and reads what they see.
        """
        shortest, longest = map(int, self.lengths.aminmax())
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
        storage = self.storage[layer]
        new = torch.stack([key, value]).transpose(2, 3)
        if together is not None:
            storage[:, :, together] = new
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            storage[:, rows, slots] = new
        keys, values = storage[:, :, :end].transpose(2, 3)
        return attend_grouped(query, keys, values, seen, None)

    def _make_room(self, layer: int, slots: int) -> None:
        storage = self.storage[layer]
        capacity = storage.shape[2]
        if slots > capacity:
            self.storage[layer] = _fit(storage, max(slots, 2 * capacity, SMALLEST))


def _fit(storage: Tensor, slots: int) -> Tensor:
    """The first ``slots`` of a layer's, with zeros for those that it has not."""
    return F.pad(storage[:, :, :slots], (0, 0, 0, 0, 0, max(0, slots - storage.shape[2])))
