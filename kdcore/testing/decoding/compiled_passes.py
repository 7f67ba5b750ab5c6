"""Passes for the suites: one that an engine compiles, and an engine that runs passes in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore.decoding.engines.protocols import CompiledPass, TraceablePass
from kdcore.decoding.engines.torch_engine import TorchEngine

WIDTH, HEADS = 8, 2


class EagerPass:
    """A `CompiledPass` that runs the module of a pass.

    Args:
        source: The pass.
    """

    def __init__(self, source: TraceablePass) -> None:
        self.source = source
        self._past: list[Tensor] = []

    @property
    def slots(self) -> int:
        """The number of slots in the cache."""
        return self._past[0].shape[2] if self._past else 0

    def start(self, rows: int) -> None:
        """Empty the cache."""
        self._past = [torch.zeros(rows, heads, 0, width) for heads, width in self.source.sizes]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the module."""
        with torch.no_grad():
            outputs, past = self.source.module()(given, self._past)
        self._past = list(past)
        return outputs

    def compact(self, slots: Tensor) -> None:
        """Keep some slots of each row."""
        index = slots[:, None, :, None]
        self._past = [
            each.gather(2, index.expand(-1, each.shape[1], -1, each.shape[3]))
            for each in self._past
        ]


class EagerEngine(TorchEngine):
    """A `CompilingEngine` in torch."""

    def compile(self, traceable: TraceablePass) -> CompiledPass:
        """Return the pass as it is."""
        return EagerPass(traceable)


class AttentionPass:
    """A pass of one attention, whose inputs are states [B, A, 8] and the mask."""

    sizes: Sequence[tuple[int, int]] = ((HEADS, WIDTH // HEADS),) * 2
    facts = "kdcore.testing: attention"

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.weight = torch.randn(WIDTH, 3 * WIDTH, generator=random)

    def weights(self) -> Mapping[str, Tensor]:
        """The only weight."""
        return {"weight": self.weight}

    def example(self, rows: int, count: int, slots: int) -> dict[str, Tensor]:
        """Random states."""
        random = torch.Generator().manual_seed(count)
        return {
            "states": torch.randn(rows, count, WIDTH, generator=random),
            "positions": torch.arange(slots, slots + count).repeat(rows, 1),
            "mask": torch.zeros(rows, 1, count, slots + count),
        }

    def module(self, float32: bool = True) -> Callable[..., Any]:
        """The attention, in float32."""
        return _Attention(self.weight)


class _Attention(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(
        self, given: Mapping[str, Tensor], past: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        states = given["states"] + given["positions"][..., None]
        query, key, value = (
            each.reshape(*each.shape[:2], HEADS, -1).transpose(1, 2)
            for each in (states @ self.weight).chunk(3, dim=-1)
        )
        keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        read = F.scaled_dot_product_attention(query, keys, values, attn_mask=given["mask"])
        return {"read": read.transpose(1, 2).flatten(2)}, [keys, values]
