"""Linear layers of a model on a CPU, computed from weights that are packed once.

A pass over a draft tree multiplies each weight matrix by a few rows, and should last as long as it
takes to read the weights once. ``linear`` is tuned for one row or for many, and for a few it
rearranges the matrix anew at each call, which costs as much as the product. Packed beforehand, 8
rows cost little more than one. And each row's product is then the same to the bit, however many
rows stand beside it: decoding one token and verifying a tree compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

TUNED_FOR = 8
"""Rows for which a matrix is laid out; other numbers of rows are as correct."""
SHARE = 0.5
"""Of the memory that is free, what the packed copies of a model may take."""
WIDENED_FROM = 3
"""Rows from which a packed float32 copy of a bfloat16 matrix beats ``linear``."""

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> its version when it was packed, and the packed copy. Tied layers share one."""


class PackedLinears:
    """Swaps the linear layers of a model for as long as a pass lasts.

    Takes float32 layers, and bfloat16 layers where the processor cannot multiply them itself: a
    copy of 4 bytes for each of their weights. A model elsewhere than on a CPU is left alone, and
    one whose copies would take more than `SHARE` of the memory that is free.
    """

    def __init__(self, model: nn.Module) -> None:
        # A subclass of Linear computes something else, e.g. a quantised layer.
        self.layers = [
            layer for layer in model.modules() if type(layer) is nn.Linear and _can_be_packed(layer)
        ]
        weights = {id(layer.weight): layer.weight for layer in self.layers}.values()
        new = [weight for weight in weights if not _is_packed(weight)]
        if new and not _there_is_room(new):
            self.layers = []
            return
        for weight in new:
            _packed[weight] = weight._version, _pack(weight)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the model's linear layers are computed from their packed weights, no gradient."""
        for layer in self.layers:
            layer.__class__ = _Packed
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__class__ = nn.Linear


class _Packed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype == torch.float32:
            return _product(input, _packed[weight][1], self.bias)
        if input.numel() < WIDENED_FROM * self.in_features:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return _product(input.float(), _packed[weight][1], bias).to(weight.dtype)


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    if weight.device.type != "cpu" or not weight.numel() or not torch._C._has_mkldnn:
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and not _multiplies_bfloat16()
    )


def _is_packed(weight: Tensor) -> bool:
    return weight in _packed and _packed[weight][0] == weight._version


def _there_is_room(weights: list[Tensor]) -> bool:
    taken = 4 * sum(weight.numel() for weight in weights)
    return bool(taken <= SHARE * psutil.virtual_memory().available)


@torch.no_grad()
def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().float(), TUNED_FOR)
    return packed


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
