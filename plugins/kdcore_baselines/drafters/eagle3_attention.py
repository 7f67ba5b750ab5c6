"""Attention of EAGLE-3's training passes; its memory grows with the length, not with its square.

In pass i the query of row r reads the keys of the first pass at the rows up to r, and those of
passes 2 to i at row r alone:

    weights = softmax([q k_1(0), ..., q k_1(r), q k_2(r), ..., q k_i(r)] / sqrt(W))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from kdcore.decoding.layers.decoder_layer import causal

BLOCK = 256
"""Rows whose scores exist at a time in `by_blocks`."""


class Unrolled:
    """Attention of the training passes (an `Attend`), called once for each pass in order."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys.append(key)
        self.values.append(value)
        if len(self.keys) == 1:
            return causal(query, key, value)
        if _compiles_for(query):
            return by_flex(query, self.keys, self.values, _compiled())
        return by_blocks(query, self.keys, self.values, BLOCK)


def by_blocks(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], block: int
) -> Tensor:
    """Compute the attention of a pass block by block, on any device.

    Args:
        query: [B, heads, T, W] queries of the pass.
        keys: Keys [B, key heads, T, W] of each pass up to this one.
        values: Values of the same shapes.
        block: Number of rows whose scores exist at a time.

    Returns:
        [B, heads, T, W].
    """
    dtype = values[0].dtype  # that of autocast, which leaves rotated queries and keys in float32
    given = (each.to(dtype) for each in (query, *keys, *values))
    read: Tensor = _ByBlocks.apply(block, *given)  # type: ignore[no-untyped-call]
    return read


def by_flex(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], flex: Callable[..., Any]
) -> Tensor:
    """Compute the attention of a pass by flex attention over the first pass's keys.

    The log of the sum of their exponentials then stands beside the scores of the other passes.

    Args:
        query: [B, heads, T, W] queries of the pass.
        keys: Keys [B, key heads, T, W] of each pass up to this one.
        values: Values of the same shapes.
        flex: `torch.nn.attention.flex_attention.flex_attention`, compiled or not.

    Returns:
        [B, heads, T, W].
    """
    dtype, length, scale = values[0].dtype, query.shape[2], 1 / math.sqrt(query.shape[3])
    query, keys = query.to(dtype), [each.to(dtype) for each in keys]  # autocast leaves it alone
    first, known = flex(
        query,
        keys[0],
        values[0],
        block_mask=_lower_triangle(length, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != keys[0].shape[1],
        return_aux=AuxRequest(lse=True),
    )
    grouped = _grouped(query * scale, keys[0])
    own = [(grouped * each[:, :, None]).sum(-1).flatten(1, 2) for each in keys[1:]]
    weights = torch.stack([known.lse, *own], dim=-1).softmax(-1).to(dtype)
    read = weights[..., :1] * first
    for place, each in enumerate(values[1:], start=1):
        shared = _grouped(weights[..., place, None], each) * each[:, :, None]
        read = read + shared.flatten(1, 2)
    attended: Tensor = read
    return attended


class _ByBlocks(torch.autograd.Function):
    """`by_blocks`, whose backward pass computes the scores of a block again.

    Of a block of rows, the first pass gives the keys of all rows up to its end, and each other pass
    those of the same rows. Shapes within a block: weights [B, key heads, group, R, known + passes].
    """

    @staticmethod
    def forward(ctx: Any, block: int, query: Tensor, *others: Tensor) -> Tensor:
        keys, values = others[: len(others) // 2], others[len(others) // 2 :]
        scaled = _grouped(query, keys[0]) / math.sqrt(query.shape[-1])
        read, total = torch.empty_like(scaled), []
        for rows in _blocks(query, block):
            scores = _products(scaled[..., rows, :], keys, rows)
            total.append(scores.logsumexp(-1, keepdim=True))
            weights = (scores - total[-1]).exp().to(query.dtype)
            read[..., rows, :] = _combined(weights, values, rows)
        ctx.save_for_backward(scaled, read, torch.cat(total, dim=-2), *others)
        ctx.block = block
        return read.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, read, total, *others = ctx.saved_tensors
        keys, values = others[: len(others) // 2], others[len(others) // 2 :]
        grad = _grouped(grads[0], keys[0])
        to_query = torch.empty_like(query)
        to_keys, to_values = ([torch.zeros_like(each) for each in some] for some in (keys, values))
        for rows in _blocks(read[:, 0], ctx.block):
            own, toward = query[..., rows, :], grad[..., rows, :]
            weights = (_products(own, keys, rows) - total[..., rows, :]).exp()
            mean = (toward * read[..., rows, :]).sum(-1, keepdim=True)
            to_scores = (weights * (_products(toward, values, rows, masked=False) - mean)).to(own)
            to_query[..., rows, :] = _combined(to_scores, keys, rows)
            _spread(to_keys, to_scores, own, rows)
            _spread(to_values, weights.to(own), toward, rows)
        to_query = to_query.flatten(1, 2) / math.sqrt(query.shape[-1])
        return None, to_query, *to_keys, *to_values


def _blocks(query: Tensor, block: int) -> list[slice]:
    length = query.shape[-2]
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _products(own: Tensor, others: Sequence[Tensor], rows: slice, *, masked: bool = True) -> Tensor:
    """Inner products of a block's vectors with those of the passes, in float32 or wider.

    Args:
        own: [B, key heads, group, R, W].
        others: [B, key heads, T, W] of each pass.
        rows: The rows of the block.
        masked: Whether later rows of the first pass get -inf.

    Returns:
        [B, key heads, group, R, known + passes - 1].
    """
    first = own @ others[0][:, :, None, : rows.stop].mT
    if masked:
        count = rows.stop - rows.start
        later = torch.ones(count, rows.stop, dtype=torch.bool, device=own.device)
        first = first.masked_fill(later.triu(rows.start + 1), -torch.inf)
    rest = [(own * each[:, :, None, rows]).sum(-1, keepdim=True) for each in others[1:]]
    return torch.cat([first, *rest], dim=-1).to(torch.promote_types(own.dtype, torch.float32))


def _combined(weights: Tensor, others: Sequence[Tensor], rows: slice) -> Tensor:
    """[B, key heads, group, R, W]: the sum of the vectors of the passes by their weights."""
    found = weights[..., : rows.stop] @ others[0][:, :, None, : rows.stop]
    for place, each in enumerate(others[1:], start=rows.stop):
        found = found + weights[..., place, None] * each[:, :, None, rows]
    return found


def _spread(totals: Sequence[Tensor], weights: Tensor, own: Tensor, rows: slice) -> None:
    """Add a block's vectors to the vectors of the passes by their weights: `_combined` turned."""
    totals[0][:, :, : rows.stop] += (weights[..., : rows.stop].mT @ own).sum(2)
    for place, total in enumerate(totals[1:], start=rows.stop):
        total[:, :, rows] += (weights[..., place, None] * own).sum(2)


def _grouped(each: Tensor, key: Tensor) -> Tensor:
    """[B, heads, T, W] as [B, key heads, group, T, W]."""
    rows, _, length, width = each.shape
    return each.reshape(rows, key.shape[1], -1, length, width)


@lru_cache(maxsize=8)
def _lower_triangle(length: int, device: torch.device) -> Any:
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(sees, None, None, length, length, device=device)


def _compiles_for(query: Tensor) -> bool:
    """Whether flex attention can be compiled for a query: uncompiled it builds all scores."""
    width = query.shape[-1]
    fits = width >= 16 and width & (width - 1) == 0
    return fits and query.device.type == "cuda" and torch.utils._triton.has_triton()


@lru_cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
