"""Attention of drafters that predict from mask slots, over all rows of a sequence at once.

The K slots of row r read the keys of the entries up to r, and those of the same row's slots:

    weights = softmax([q k(0), ..., q k(r), q k_1(r), ..., q k_K(r)] / sqrt(W))

If the slots are ordered, slot i reads the slots up to i only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcore.decoding.layers.decoder_layer import causal

SCORES = 1 << 22
"""Maximum number of scores of a head that exist at a time."""


class Entries(NamedTuple):
    """The keys and values of a sequence's entries.

    Attributes:
        keys: [B, key heads, T, W].
        values: [B, key heads, T, W].
    """

    keys: Tensor
    values: Tensor


class EntriesAndSlots:
    """Attention of T entries, which are causal, and of their K ordered slots: an `Attend`.

    It takes the entries first, [0, T), and then the slots of entry 0, those of entry 1, and so on.

    Args:
        entries: Number of entries T.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = self.entries
        known = Entries(key[:, :, :count], value[:, :, :count])
        read = causal(query[:, :, :count], *known)
        if query.shape[2] == count:
            return read
        given = (each[:, :, count:] for each in (query, key, value))
        return torch.cat([read, SlotsOf(known, ordered=True)(*given)], dim=2)


class SlotsOf:
    """Attention of the K slots of each of T entries: an `Attend` of [B, heads, T * K, W].

    Its scores exist for a block of rows at a time; the backward pass computes them again.

    Args:
        entries: The keys and values of the entries.
        ordered: Whether a slot reads the slots up to its own, or all of its row.
    """

    def __init__(self, entries: Entries, *, ordered: bool) -> None:
        self.entries, self.ordered = entries, ordered

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = self.entries.keys.shape[2]
        dtype = value.dtype  # that of autocast, which leaves rotated queries and keys in float32
        own = [each.to(dtype).unflatten(2, (count, -1)) for each in (query, key, value)]
        known = [each.to(dtype) for each in self.entries]
        rows = max(1, SCORES // (count * own[0].shape[3]))
        blocks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
        read = [
            checkpoint(
                _read,
                *(each[:, :, block] for each in own),
                *(each[:, :, : block.stop] for each in known),
                self.ordered,
                use_reentrant=False,
            )
            for block in blocks
        ]
        return torch.cat(read, dim=2).flatten(2, 3)


def _read(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, ordered: bool
) -> Tensor:
    """Attention of the slots of the last R of S entries.

    Args:
        query: [B, heads, R, K, W].
        key: [B, key heads, R, K, W] of the slots.
        value: [B, key heads, R, K, W] of the slots.
        keys: [B, key heads, S, W] of the entries.
        values: [B, key heads, S, W] of the entries.
        ordered: Whether a slot reads the slots up to its own only.

    Returns:
        [B, heads, R, K, W].
    """
    rows, slots, width = query.shape[2:]
    known = keys.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)) / math.sqrt(width)  # [B, key heads, n, ...]
    entry = torch.arange(known, device=query.device)
    later = entry > entry[known - rows :, None, None]  # [R, 1, S]
    scores = (grouped.flatten(3, 4) @ keys[:, :, None].mT).unflatten(3, (rows, slots))
    own = grouped @ key[:, :, None].mT
    if ordered:
        ahead = torch.ones(slots, slots, dtype=torch.bool, device=query.device).triu(1)
        own = own.masked_fill(ahead, -torch.inf)
    both = torch.cat([scores.masked_fill(later, -torch.inf), own], dim=-1)
    weights = both.softmax(-1, dtype=torch.promote_types(both.dtype, torch.float32)).to(value)
    on_entries, on_slots = weights.split([known, slots], dim=-1)
    read = (on_entries.flatten(3, 4) @ values[:, :, None]).unflatten(3, (rows, slots))
    return (read + on_slots @ value[:, :, None]).flatten(1, 2)
