"""A drafter's pass through torch.compile, with a cache of its own at fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.decoding.engines.cache import SMALLEST
from kdcore_compiled.compilation import Compilation
from kdcore_compiled.static_cache import enlarged, recurring

if TYPE_CHECKING:
    from kdcore.decoding.engines.protocols import TraceablePass
    from kdcore_compiled.plugin import CompiledParams

HIDDEN = torch.finfo(torch.float32).min
"""Entry of a mask where a slot is not read."""


class CompiledDrafterPass:
    """A `kdcore.decoding.engines.protocols.CompiledPass` that reads the present weights.

    The entries of a pass and the slots that it reads are rounded up to powers of two, as those of
    the target's passes; the first pass and long ones run uncompiled.

    Args:
        source: The pass.
        params: The longest compiled pass, and the mode.
        device: Device of the drafter.
    """

    def __init__(self, source: TraceablePass, params: CompiledParams, device: torch.device) -> None:
        self.source, self.params, self.device = source, params, device
        self._step = Compilation(self._appended, "the drafter", params, device)
        self._module: Any = None
        self._storage: list[Tensor] = []
        self._slots = self._rows = 0

    @property
    def slots(self) -> int:
        """The number of slots in the cache."""
        return self._slots

    def start(self, rows: int) -> None:
        """Empty the cache; its storage stays if it suits.

        Args:
            rows: Number of rows B.
        """
        self._module = self.source.module(float32=False)
        if rows != self._rows:
            self._storage = []
        self._rows, self._slots = rows, 0

    @torch.no_grad()
    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a pass; see `kdcore.decoding.engines.protocols.CompiledPass.run`."""
        if not self.source.sizes:
            return self._step(given, 0, None)
        count = given["positions"].shape[1]
        width = recurring(count)
        self._reserve(self._slots + width)
        few = count <= self.params.tokens and self._slots > 0
        window = recurring(self._slots, SMALLEST) if few else self._slots
        if few:
            given = {
                name: self._padded_mask(each, width, window)
                if name == "mask"
                else _padded(each, count, width)
                for name, each in given.items()
            }
        else:
            width = count
        places = torch.arange(self._slots, self._slots + width, device=self.device)
        found = (self._step if few else self._appended)(given, window, places)
        self._slots += count
        return {name: each[:, :count] for name, each in found.items()}

    def compact(self, slots: Tensor) -> None:
        """Keep some slots of each row; see `kdcore.decoding.engines.protocols.Engine.compact`."""
        index = slots[:, None, :, None]
        for storage in self._storage:
            _, heads, _, width = storage.shape
            kept = storage.gather(2, index.expand(-1, heads, -1, width))
            storage[:, :, : slots.shape[1]] = kept
        self._slots = slots.shape[1]

    def _appended(
        self, given: Mapping[str, Tensor], window: int, places: Tensor | None
    ) -> dict[str, Tensor]:
        """Run the pass after ``window`` slots; write its entries [A] to the cache at ``places``."""
        past = [storage[:, :, :window] for storage in self._storage]
        found, after = self._module(given, past)
        if places is not None:
            for storage, each in zip(self._storage, after, strict=True):
                storage.index_copy_(2, places, each[:, :, window:])
        return dict(found)

    def _reserve(self, slots: int) -> None:
        """Make room for a number of slots."""
        if not self._storage:
            kind = next(self._module.parameters()).dtype
            self._storage = [
                torch.zeros(self._rows, heads, 0, width, dtype=kind, device=self.device)
                for heads, width in self.source.sizes
            ]
        room = recurring(slots, SMALLEST)
        self._storage = [enlarged(storage, room) for storage in self._storage]

    def _padded_mask(self, given: Tensor, width: int, window: int) -> Tensor:
        """Pad the entries and the slots of a mask [B, 1, A, S + A] with what is hidden."""
        rows, _, count, _ = given.shape
        padded = given.new_full((rows, 1, width, window + width), HIDDEN)
        padded[:, :, :count, : self._slots] = given[..., : self._slots]
        new = slice(window, window + count)
        padded[:, :, :count, new] = given[..., self._slots :]
        return padded


def _padded(given: Tensor, count: int, width: int) -> Tensor:
    """Pad the ``count`` entries of an input [B, A, ...] with zeros; others stay as they are."""
    if given.shape[1] != count or count == width:
        return given
    padded = given.new_zeros(len(given), width, *given.shape[2:])
    padded[:, :count] = given
    return padded
