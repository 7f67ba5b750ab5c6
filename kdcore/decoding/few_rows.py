"""Linear layers of a model on a CPU, computed the way that is quick for a few rows.

A pass over a draft tree multiplies each weight matrix by a few rows, and lasts as long as it takes
to read the weights once: so much for the arithmetic. The libraries beneath ``linear`` are tuned for
one row or for many. Between the two, the same product with the matrix in front (float32), or with
the matrix widened to float32 piece by piece (bfloat16 on a processor without instructions for it),
takes half the time or less. Results differ from ``linear``'s in the last bits, as those of
different numbers of rows do anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WIDENED_FROM = 6
"""Rows from which widening a bfloat16 matrix costs less than `linear`."""
PIECE = 2**19
"""Elements of a matrix that are widened at once: few enough to stay in a processor's cache."""


class FewRows:
    """Swaps the linear layers of a model for as long as a pass takes.

    One row is left to ``linear``, so that plain decoding of one prompt is what the model computes
    without us. A model elsewhere than on a CPU is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.swaps: list[tuple[nn.Linear, type[nn.Linear]]] = []
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
                if layer.weight.dtype == torch.float32:
                    self.swaps.append((layer, _MatrixFirst))
                elif layer.weight.dtype == torch.bfloat16 and not _multiplies_bfloat16():
                    self.swaps.append((layer, _Widened))

    @contextmanager
    def at_work(self, rows: int) -> Iterator[None]:
        """Inside, the model's linear layers are computed for ``rows`` rows."""
        swaps = self.swaps if rows > 1 else []
        for layer, quick in swaps:
            layer.__class__ = quick
        try:
            yield
        finally:
            for layer, _ in swaps:
                layer.__class__ = nn.Linear


class _MatrixFirst(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        product = torch.mm(self.weight, rows.t()).t().contiguous()
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)


class _Widened(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        if len(rows) < WIDENED_FROM:
            return super().forward(input)
        columns = rows.float().t()
        product = input.new_empty(len(rows), self.out_features)
        size = max(1, PIECE // self.in_features)
        wide = torch.empty(min(size, self.out_features), self.in_features)
        for start in range(0, self.out_features, size):
            piece = self.weight[start : start + size]
            matrix = wide[: len(piece)].copy_(piece)
            product[:, start : start + size] = torch.mm(matrix, columns).t()
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)


def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
