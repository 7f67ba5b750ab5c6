"""Drafters whose passes an engine can run: the pass as a function of tensors, and its rows there.

The engine appends the entries of all rows at the same slots. Masks hide padding and the drafts of
earlier rounds; when many slots are hidden, the engine drops them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.decoding.drafters.module import DraftingModule
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.decoding.engines.protocols import CompiledPass, CompilingEngine
from kdcore.decoding.layers.decoder_layer import Attend, LayerSize

SPARE = 64
"""Number of hidden slots from which they are dropped, and of new slots after which they are
counted."""


class TraceableDrafter(DraftingModule):
    """A `kdcore.decoding.protocols.CompiledDrafter`, whose pass is `traced`.

    Attributes:
        compiled: The pass in an engine, or None while torch runs it.
        cache: The rows in torch, after ``start``; not set where the pass has no cache.
    """

    compiled: CompiledRows | None = None
    cache: RowCache

    def start(self, first: Tensor) -> None:
        """Start B empty rows where the pass runs; see `kdcore.decoding.protocols.Drafter.start`."""
        if self.compiled is not None:
            self.compiled.start(first)
        elif self.traceable().size is not None:
            self.cache = self.empty_cache(len(first))

    def empty_cache(self, rows: int) -> RowCache:
        """Create an empty cache of the pass in torch.

        Args:
            rows: Number of rows.

        Returns:
            The cache of keys and values, without entries.
        """
        of = self.traceable()
        assert of.size is not None, "the pass has no cache"
        return RowCache(rows, of.layers, of.size, like=next(self.parameters()))

    def use_engine(self, engine: CompilingEngine | None) -> None:
        """Choose what runs the pass from the next ``start`` on.

        Args:
            engine: The engine; None for torch.

        Raises:
            UserError: The engine cannot run the pass; it then runs in torch.
        """
        self.compiled = None
        if engine is not None:
            self.compiled = CompiledRows(engine.compile(self.traceable()))

    def traceable(self) -> DrafterPass:
        """Describe the pass: its inputs and the layers of its cache."""
        raise NotImplementedError

    def traced(self, given: Mapping[str, Tensor], attends: Iterator[Attend]) -> dict[str, Tensor]:
        """Compute the pass.

        Args:
            given: The inputs of `DrafterPass`.
            attends: An `Attend` for each layer of the cache.

        Returns:
            The outputs; ``logp`` is one of them.
        """
        raise NotImplementedError

    def in_float32(self) -> TraceableDrafter:
        """Return this drafter, or a copy in float32 that shares the target."""
        head = self.head
        if self.dtype == torch.float32 and (head.weight is None or head.weight.dtype == self.dtype):
            return self
        shared: dict[int, Any] = {id(each): each for each in (self._embedding, self._target_head)}
        shared[id(self.compiled)] = None
        copied: TraceableDrafter = copy.deepcopy(self, shared).float()
        copied._rows = replace(head, weight=_single(head.weight), bias=_single(head.bias))
        return copied


def _single(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float()


@dataclass(frozen=True)
class DrafterPass:
    """The pass of a drafter, a `kdcore.decoding.engines.protocols.TraceablePass`.

    Its inputs are ``widths``, and with a cache places [B, M] int64, the entries whose log-probs are
    returned, positions [B, A] int64 and mask [B, 1, A, S + A].

    Attributes:
        drafter: The drafter.
        widths: Names of inputs [B, A, width] and their widths.
        layers: Number of layers with a cache.
        size: Sizes of these layers; None without them.
    """

    drafter: TraceableDrafter
    widths: Mapping[str, int]
    layers: int = 0
    size: LayerSize | None = None
    facts = None

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """The heads and width of keys and values, in turn."""
        size = self.size
        return () if size is None else [(size.key_heads, size.head)] * (2 * self.layers)

    def weights(self) -> Mapping[str, Tensor]:
        """The weights of the drafter and those of its head."""
        head = self.drafter.head
        shared = {"head.weight": head.weight, "head.bias": head.bias}
        own = dict(self.drafter.state_dict())
        return own | {name: each for name, each in shared.items() if each is not None}

    def example(self, rows: int, count: int, slots: int) -> dict[str, Tensor]:
        """Constant inputs; see `kdcore.decoding.engines.protocols.TraceablePass.example`."""
        given = {name: torch.full((rows, count, width), 0.1) for name, width in self.widths.items()}
        if self.size is not None:
            given["places"] = torch.full((rows, 1), count - 1)
            given["positions"] = torch.arange(slots, slots + count).repeat(rows, 1)
            given["mask"] = torch.zeros(rows, 1, count, slots + count)
        return given

    def module(self, float32: bool = True) -> nn.Module:
        """The pass as a module; see `kdcore.decoding.engines.protocols.TraceablePass.module`."""
        return _Module(self.drafter.in_float32() if float32 else self.drafter)


class _Module(nn.Module):
    def __init__(self, drafter: TraceableDrafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(
        self, given: Mapping[str, Tensor], past: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        cache = list(past)
        attends = (
            partial(_attend, cache, layer, given["mask"]) for layer in range(len(cache) // 2)
        )
        return self.drafter.traced(given, attends), cache


def _attend(
    cache: list[Tensor], layer: int, mask: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Append keys and values to a layer of the cache and read it, with operations that fuse."""
    keys = cache[2 * layer] = torch.cat([cache[2 * layer], key], 2)
    values = cache[2 * layer + 1] = torch.cat([cache[2 * layer + 1], value], 2)
    shared = query.shape[1] // key.shape[1]
    if mask.dtype != query.dtype:
        # rounded, the least float32 would be -inf, and a row that reads nothing NaN
        mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    return F.scaled_dot_product_attention(
        query, _repeated(keys, shared), _repeated(values, shared), attn_mask=mask
    )


def _repeated(each: Tensor, times: int) -> Tensor:
    """[B, heads, S, W] from [B, key heads, S, W]."""
    if times == 1:
        return each
    rows, heads, slots, width = each.shape
    return each[:, :, None].expand(-1, -1, times, -1, -1).reshape(rows, heads * times, slots, width)


def at_places(hidden: Tensor, places: Tensor) -> Tensor:
    """Choose entries of each row.

    Args:
        hidden: [B, A, ...].
        places: [B, M] int64.

    Returns:
        [B, M, ...].
    """
    rest = hidden.shape[2:]
    index = places.view(*places.shape, *[1] * len(rest)).expand(-1, -1, *rest)
    return hidden.gather(1, index)


class CompiledRows:
    """Rows of different lengths in the cache of a compiled pass.

    Args:
        compiled: The pass.

    Attributes:
        lengths: [B] int64, number of entries of each row.
    """

    def __init__(self, compiled: CompiledPass) -> None:
        self.compiled = compiled

    def start(self, first: Tensor) -> None:
        """Reset to B empty rows.

        Args:
            first: [B], a tensor on the device.
        """
        self.compiled.start(len(first))
        self.lengths = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        self._kept = self.lengths.new_zeros(len(first), 0, dtype=torch.bool)
        self._new = 0

    def read(self, lengths: Tensor, slots: int = 0, **given: Tensor) -> dict[str, Tensor]:
        """Add entries, which each read those up to their own, and drop the drafts.

        Args:
            lengths: [B] int64, the number of real entries; the others are padding.
            slots: Number of drafts that stand after the real entries of each row.
            **given: The inputs [B, A, width] of the pass.

        Returns:
            The outputs, with the log-probs of each row's newest entry and of its drafts.
        """
        self._drop_hidden()
        count = next(iter(given.values())).shape[1]
        order = torch.arange(count, device=lengths.device)
        sees = (order <= order[:, None]).expand(len(lengths), -1, -1)
        positions = self.lengths[:, None] + order
        newest = (lengths - 1).clamp(min=0)[:, None]
        outputs = self._run(given, newest + order[: slots + 1], positions, sees)
        self._kept = torch.cat([self._kept, order < lengths[:, None]], dim=1)
        self.lengths = self.lengths + lengths
        return outputs

    def draft(self, sees: Tensor, positions: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Add drafts, which read all entries of their row, until the next ``read``.

        Args:
            sees: [B, A, N] bool, the mask of A new drafts over all N drafts, themselves included.
            positions: [B, A] int64.
            **given: The inputs [B, A, width] of the pass.

        Returns:
            The outputs, with the log-probs of all new drafts.
        """
        rows, count, _ = sees.shape
        places = torch.arange(count, device=sees.device).expand(rows, -1)
        outputs = self._run(given, places, positions, sees)
        self._kept = F.pad(self._kept, (0, count))
        return outputs

    def run(self, **given: Tensor) -> dict[str, Tensor]:
        """Run a pass without a cache.

        Args:
            **given: The inputs of the pass.

        Returns:
            The outputs.
        """
        float32 = {name: each.float() for name, each in given.items() if each.is_floating_point()}
        return self.compiled.run(given | float32)

    def _run(
        self, given: Mapping[str, Tensor], places: Tensor, positions: Tensor, sees: Tensor
    ) -> dict[str, Tensor]:
        """Run the pass; ``sees`` [B, A, N] is the mask over the last N slots, new ones included."""
        self._new += sees.shape[1]
        before = self._kept.shape[1] + sees.shape[1] - sees.shape[2]
        seen = torch.cat([self._kept[:, None, :before].expand(-1, sees.shape[1], -1), sees], dim=2)
        hidden = torch.finfo(torch.float32).min
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, hidden)[:, None]
        return self.run(**given, places=places, positions=positions, mask=mask)

    def _drop_hidden(self) -> None:
        """Drop hidden slots; the host waits for the device, so it looks once in a while."""
        if self._new < SPARE:
            return
        self._new, longest = 0, int(self.lengths.max())
        if self._kept.shape[1] - longest >= SPARE:
            slots = torch.argsort((~self._kept).byte(), dim=1, stable=True)[:, :longest]
            self.compiled.compact(slots)
            self._kept = self._kept.gather(1, slots)
