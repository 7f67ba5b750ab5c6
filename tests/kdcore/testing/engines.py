"""A sound engine, and faulty ones with the faults that their names say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.engines.torch_engine import TorchEngine


class SoundEngine(TorchEngine):
    """The reference by another name."""


class IgnoresMasks(TorchEngine):
    def run(self, tokens: Tensor, positions: Tensor, masks: Any, logits_of: Any) -> Any:
        if masks is not None:
            masks = {kind: torch.ones_like(mask) for kind, mask in masks.items()}
        return super().run(tokens, positions, masks, logits_of)


class CountsPositions(TorchEngine):
    def run(self, tokens: Tensor, positions: Tensor, masks: Any, logits_of: Any) -> Any:
        places = self.slots + torch.arange(tokens.shape[1]).expand_as(tokens)
        return super().run(tokens, places, masks, logits_of)


class NeverEmpties(TorchEngine):
    def start(self, rows: int, slots: int | None = None) -> None:
        if not self.slots or len(self.cache.keys[0]) != rows:
            super().start(rows, slots)


class KeepsOtherSlots(TorchEngine):
    def compact(self, slots: Tensor) -> None:
        super().compact(torch.arange(slots.shape[1]).expand_as(slots))


class NeverCompacts(TorchEngine):
    def compact(self, slots: Tensor) -> None:
        """Leave all slots."""


class KeepsOtherRows(TorchEngine):
    def select(self, rows: Tensor) -> None:
        super().select(rows.sort().values)


class GivesAllLogits(TorchEngine):
    def run(self, tokens: Tensor, positions: Tensor, masks: Any, logits_of: Any) -> Any:
        return super().run(tokens, positions, masks, None)


class SortsLayers(TorchEngine):
    def bind(self, target: Any, layers: tuple[int, ...]) -> None:
        super().bind(target, tuple(sorted(layers)))


class LeavesHooks(TorchEngine):
    def run(self, tokens: Tensor, positions: Tensor, masks: Any, logits_of: Any) -> Any:
        self.target.register_forward_hook(lambda *_: None)
        return super().run(tokens, positions, masks, logits_of)


class TakesAnyLayer(TorchEngine):
    def bind(self, target: Any, layers: tuple[int, ...]) -> None:
        super().bind(target, tuple(min(layer, 3) for layer in layers))
