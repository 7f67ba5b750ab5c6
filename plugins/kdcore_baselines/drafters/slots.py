"""Attention of slots that stand beside the entries of a sequence, for all of its rows at once.

The J queries of row r read the keys of the entries up to r, and those of the row's own K slots:

    weights = softmax([q k(0), ..., q k(r), q k_1(r), ..., q k_K(r)] / sqrt(W))

Its memory grows with the number of rows, not with its square: scores exist for a block of rows at a
time, and the backward pass computes them again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcore.decoding.layers.decoder_layer import causal

SCORES = 1 << 20
"""Maximum number of scores of a head that exist at a time, if a row alone has not more."""


class Keys(NamedTuple):
    """Keys and values of entries [B, key heads, T, W], or of slots [B, key heads, T, K, W]."""

    keys: Tensor
    values: Tensor


class EntriesAndSlots:
    """Attention of T entries, which are causal, and of their K slots, which are too: an `Attend`.

    It takes the entries first, [0, T), and then the slots of entry 0, those of entry 1, and so on.

    Args:
        entries: Number of entries T.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = self.entries
        known = Keys(key[:, :, :count], value[:, :, :count])
        read = causal(query[:, :, :count], *known)
        if query.shape[2] == count:
            return read
        given = (each[:, :, count:] for each in (query, key, value))
        return torch.cat([read, SlotsOf(known, ordered=True)(*given)], dim=2)


class SlotsOf:
    """Attention of the K slots of each of T entries: an `Attend` of [B, heads, T * K, W].

    Args:
        entries: The keys and values of the entries.
        ordered: Whether a slot reads the slots up to its own, or all of its row.
    """

    def __init__(self, entries: Keys, *, ordered: bool) -> None:
        self.entries, self.ordered = entries, ordered

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = self.entries.keys.shape[2]
        query, key, value = (
            each.reshape(*each.shape[:2], count, -1, each.shape[3]) for each in (query, key, value)
        )
        read = beside_entries(query, self.entries, Keys(key, value), ordered=self.ordered)
        return read.flatten(2, 3)


def beside_entries(query: Tensor, entries: Keys, slots: Keys, *, ordered: bool = False) -> Tensor:
    """Compute the attention of the queries of each row.

    Args:
        query: [B, heads, T, J, W].
        entries: The keys and values of the T entries.
        slots: The keys and values of the K slots of each entry.
        ordered: Whether query j reads the slots up to j only.

    Returns:
        [B, heads, T, J, W].
    """
    dtype = slots.values.dtype  # that of autocast, which leaves rotated queries and keys in float32
    given = (each.to(dtype) for each in (query, *entries, *slots))
    read: Tensor = _ByBlocks.apply(ordered, *given)  # type: ignore[no-untyped-call]
    return read


class _ByBlocks(torch.autograd.Function):
    """`beside_entries`. Queries have their group: [B, key heads, group, T, J, W]."""

    @staticmethod
    def forward(ctx: Any, ordered: bool, query: Tensor, *others: Tensor) -> Tensor:
        entries, slots = Keys(*others[:2]), Keys(*others[2:])
        scaled = _grouped(query, slots.keys) / math.sqrt(query.shape[-1])
        read, total = torch.empty_like(scaled), []
        for rows in _blocks(scaled, slots.keys):
            scores = _scores(scaled[:, :, :, rows], entries.keys, slots.keys, rows, ordered)
            total.append(scores.logsumexp(-1, keepdim=True))
            weights = (scores - total[-1]).exp().to(query.dtype)
            read[:, :, :, rows] = _combined(weights, entries.values, slots.values, rows)
        ctx.save_for_backward(scaled, read, torch.cat(total, dim=3), *others)
        ctx.ordered = ordered
        return read.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, read, total, *others = ctx.saved_tensors
        entries, slots = Keys(*others[:2]), Keys(*others[2:])
        grad = _grouped(grads[0], slots.keys)
        to_query = torch.empty_like(query)
        to_entries, to_slots = (
            Keys(*(torch.zeros_like(each) for each in some)) for some in (entries, slots)
        )
        for rows in _blocks(query, slots.keys):
            own, toward = query[:, :, :, rows], grad[:, :, :, rows]
            scores = _scores(own, entries.keys, slots.keys, rows, ctx.ordered)
            weights = (scores - total[:, :, :, rows]).exp()
            mean = (toward * read[:, :, :, rows]).sum(-1, keepdim=True)
            to_weights = _products(toward, entries.values, slots.values, rows)
            to_scores = (weights * (to_weights - mean)).to(own)
            to_query[:, :, :, rows] = _combined(to_scores, entries.keys, slots.keys, rows)
            _spread(to_entries.keys, to_slots.keys, to_scores, own, rows)
            _spread(to_entries.values, to_slots.values, weights.to(own), toward, rows)
        to_query = to_query.flatten(1, 2) / math.sqrt(query.shape[-1])
        return None, to_query, *to_entries, *to_slots


def _blocks(query: Tensor, slots: Tensor) -> list[slice]:
    length, queries = query.shape[3:5]
    block = max(1, SCORES // (queries * (length + slots.shape[3])))
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _products(own: Tensor, entries: Tensor, slots: Tensor, rows: slice) -> Tensor:
    """Inner products of a block's vectors with those of entries and slots, in float32 or wider.

    Args:
        own: [B, key heads, group, R, J, W].
        entries: [B, key heads, T, W].
        slots: [B, key heads, T, K, W].
        rows: The R rows of the block.

    Returns:
        [B, key heads, group, R, J, known + K], where known is the end of the block.
    """
    known = own.flatten(3, 4) @ entries[:, :, None, : rows.stop].mT
    beside = own @ slots[:, :, None, rows].mT
    both = torch.cat([known.view(*own.shape[:5], -1), beside], dim=-1)
    return both.to(torch.promote_types(own.dtype, torch.float32))


def _scores(own: Tensor, entries: Tensor, slots: Tensor, rows: slice, ordered: bool) -> Tensor:
    """`_products` with -inf at the entries after each row, and at the slots after each query's."""
    scores = _products(own, entries, slots, rows)
    entry = torch.arange(rows.stop, device=scores.device)
    later = entry > entry[rows.start :, None, None]
    scores[..., : rows.stop].masked_fill_(later, -torch.inf)
    if ordered:
        beside = scores[..., rows.stop :]
        ahead = torch.ones(beside.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        beside.masked_fill_(ahead, -torch.inf)
    return scores


def _combined(weights: Tensor, entries: Tensor, slots: Tensor, rows: slice) -> Tensor:
    """[B, key heads, group, R, J, W]: the sum of the vectors by their weights."""
    known, beside = weights[..., : rows.stop], weights[..., rows.stop :]
    read = known.flatten(3, 4) @ entries[:, :, None, : rows.stop]
    return read.view(*known.shape[:5], -1) + beside @ slots[:, :, None, rows]


def _spread(entries: Tensor, slots: Tensor, weights: Tensor, own: Tensor, rows: slice) -> None:
    """Add a block's vectors to those of entries and slots by the weights: `_combined` turned."""
    known, beside = weights[..., : rows.stop], weights[..., rows.stop :]
    entries[:, :, : rows.stop] += (known.flatten(3, 4).mT @ own.flatten(3, 4)).sum(2)
    slots[:, :, rows] += (beside.mT @ own).sum(2)


def _grouped(each: Tensor, slots: Tensor) -> Tensor:
    """[B, heads, T, J, W] as [B, key heads, group, T, J, W]."""
    return each.reshape(len(each), slots.shape[1], -1, *each.shape[2:])
