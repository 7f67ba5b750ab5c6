"""A model's pass on a CPU, with linear layers computed from weights that are packed once.

A pass over a draft tree multiplies each weight matrix by a few rows, and should last as long as it
takes to read the weights once. ``linear`` is tuned for one row or for many, and for a few it
rearranges the matrix anew at each call, which costs as much as the product. Packed beforehand, 8
rows cost little more than one. And each row's product is then the same to the bit, however many
rows stand beside it: decoding one token and verifying a tree compute the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

TUNED_FOR = 8
"""Rows for which a float32 matrix is laid out; other numbers of rows are as correct."""
SHARE = 0.5
"""Of the memory that is free, what the packed copies of a model may take."""
HALF_STEP = 3
"""FBGEMM sums the last one or two of its rows in another order; of multiples of 3 it has none."""
HALF_MAX = torch.finfo(torch.float16).max

Packing: TypeAlias = "_Single | _Half"

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> its version when it was packed, and its `Packing`. Tied layers share one."""
_widened: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What is no linear layer's, in bfloat16 -> its version when it was copied, and it in float32."""


class PackedLinears:
    """Swaps the linear layers of a model for as long as a pass lasts.

    Takes float32 models, and bfloat16 ones where the processor cannot multiply bfloat16 itself. Of
    those only the weights are bfloat16 then, and the rest of the pass is float32: what is rounded
    to 8 bits in every layer would not be the same in a pass over one token as in one over several.

    The copies have as many bytes a weight as the layers, or 4 where a bfloat16 matrix has no exact
    copy in half precision. A model elsewhere than on a CPU is left alone, and one whose copies
    might take more than `SHARE` of the memory that is free.
    """

    def __init__(self, model: nn.Module) -> None:
        # A subclass of Linear computes something else, e.g. a quantised layer.
        self.layers = [
            layer for layer in model.modules() if type(layer) is nn.Linear and _can_be_packed(layer)
        ]
        packed = {id(layer) for layer in self.layers}
        self.others: list[tuple[dict[str, Any], str]] = [
            (held, name)
            for module in model.modules()
            if id(module) not in packed
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None and _is_to_be_widened(tensor)
        ]
        weights = _not_yet(_packed, (layer.weight for layer in self.layers))
        others = _not_yet(_widened, (held[name] for held, name in self.others))
        new = [*weights, *others]
        if new and not _there_is_room(new):
            self.layers, self.others = [], []
            return
        for weight in weights:
            _packed[weight] = _version(weight), _pack(weight)
        for other in others:
            _widened[other] = _version(other), other.detach().float()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the model's linear layers are computed from their packed weights, no gradient."""
        kept = [(held, name, held[name]) for held, name in self.others]
        for layer in self.layers:
            layer.__class__ = _Packed
        for held, name, tensor in kept:
            held[name] = _widened[tensor][1]
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__class__ = nn.Linear
            for held, name, tensor in kept:
                held[name] = tensor


class _Packed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        packing: Packing = _packed[self.weight][1]
        rows = packing(input.reshape(-1, self.in_features).float(), self)
        return rows.view(*input.shape[:-1], self.out_features).to(input.dtype)


class _Single:
    """A matrix in float32, in the layout that oneDNN reads best."""

    def __init__(self, weight: Tensor) -> None:
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.float(), TUNED_FOR)

    def __call__(self, rows: Tensor, layer: nn.Linear) -> Tensor:
        """[M, outputs] float32 from ``rows`` [M, inputs] float32, with the layer's bias."""
        bias = None if layer.bias is None else layer.bias.float()
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, bias, "none", [], ""
        )
        return product


class _Half:
    """A bfloat16 matrix in half precision, which FBGEMM multiplies by float32 rows.

    weight: an exact copy times ``scale``, a power of 2; see `_in_half_precision`.
    """

    def __init__(self, weight: Tensor, scale: float) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        self.undo = 1 / scale

    def __call__(self, rows: Tensor, layer: nn.Linear) -> Tensor:
        """[M, outputs] float32 from ``rows`` [M, inputs] float32, with the layer's bias."""
        count = len(rows)
        padded = rows.new_zeros(-(-count // HALF_STEP) * HALF_STEP, layer.in_features)
        torch.mul(rows, self.undo, out=padded[:count])
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(padded, self.packed)[:count]
        if layer.bias is not None:
            product += layer.bias
        return product


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    if weight.device.type != "cpu" or not weight.numel() or not torch._C._has_mkldnn:
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and not _multiplies_bfloat16()
    )


def _is_to_be_widened(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and not _multiplies_bfloat16()
    )


def _not_yet(copies: WeakTensorKeyDictionary, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of which there is no copy, or one of other values; each once."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    return [t for t in distinct if t not in copies or copies[t][0] != _version(t)]


def _version(weight: Tensor) -> int:
    """How often it was written; a weight made in inference mode counts nothing."""
    return 0 if weight.is_inference() else weight._version


def _there_is_room(weights: list[Tensor]) -> bool:
    taken = 4 * sum(weight.numel() for weight in weights)
    return bool(taken <= SHARE * psutil.virtual_memory().available)


@torch.no_grad()
def _pack(weight: Tensor) -> Packing:
    weight = weight.detach()
    if weight.dtype == torch.float32:
        return _Single(weight)
    half = _in_half_precision(weight) if _has_fbgemm() else None
    return _Single(weight) if half is None else _Half(*half)


def _in_half_precision(weight: Tensor) -> tuple[Tensor, float] | None:
    """The matrix times the power of 2 that fits it into half precision, and that power.

    Half precision has more digits than bfloat16 and a smaller range: None where some weight has no
    exact copy, being too small beside the largest one.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return None
    scale = 2.0 ** math.floor(math.log2(HALF_MAX / largest))
    scaled = weight.float() * scale
    half = scaled.half()
    return (half, scale) if torch.equal(half.float(), scaled) else None


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
