"""Weight matrices packed once for products with a few rows on a CPU.

A pass over a draft tree multiplies each weight matrix by a few rows, and should take as long as one
read of the weights. ``linear`` is tuned for one row or for many; for a few, it rearranges the
matrix at each call, which costs as much as the product. With packed matrices, 8 rows cost little
more than one. The product of each row is then also independent, to the bit, of the number of rows:
decoding one token and verifying a tree compute the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

TUNED_FOR = 8
"""Number of rows that a packed float32 matrix is optimised for; any other number works too."""
HALF_STEP = 3
"""FBGEMM sums the rows beyond a multiple of 3 in another order, so rows are padded to one."""
SHARED = 700_000
"""Minimum number of weights for all threads to share a half-precision product."""
HALF_MAX = torch.finfo(torch.float16).max

Packing: TypeAlias = "_Single | _Half"

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> its version when packed, and its `Packing`. Tied layers share one entry."""


class PackedWeights:
    """Linear layers with the same input, computed as one product.

    The copy takes as many bytes per weight as the layers, or 4 for a bfloat16 matrix without an
    exact copy in half precision.

    Args:
        matrices: Weight [outputs, inputs] and bias [outputs] (or None) of each layer.
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        weights = [weight for weight, _ in matrices]
        self.inputs = weights[0].shape[1]
        self.outputs = sum(weight.shape[0] for weight in weights)
        self.packing = _packing_of(weights)
        self.bias = None
        if any(bias is not None for _, bias in matrices):
            self.bias = torch.cat([_bias(*each) for each in matrices])

    @classmethod
    def of(cls, *layers: nn.Linear) -> PackedWeights:
        """Pack the weights of layers, each of which `is_plain`."""
        return cls([(layer.weight, layer.bias) for layer in layers])

    def __call__(self, input: Tensor) -> Tensor:
        """[..., outputs] from [..., inputs], in the dtype of the input."""
        rows = self.packing(input.reshape(-1, self.inputs).float(), self.bias)
        return rows.view(*input.shape[:-1], self.outputs).to(input.dtype)


class _Single:
    """A float32 matrix in the preferred layout of oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.float(), TUNED_FOR)

    def __call__(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[M, outputs] float32 from ``rows`` [M, inputs] float32."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, bias, "none", [], ""
        )
        return product


class _Half:
    """A bfloat16 matrix in half precision, which FBGEMM multiplies by float32 rows.

    weight: the exact copy, multiplied by ``scale``, a power of 2; see `_in_half_precision`.
    """

    def __init__(self, weight: Tensor, scale: float) -> None:
        self.undo = 1 / scale
        self.blank = weight.new_zeros(HALF_STEP, weight.shape[1], dtype=torch.float32)
        pack = _by_all_threads if weight.numel() >= SHARED else _by_one_thread
        with warnings.catch_warnings():  # each emits a deprecation warning once
            warnings.simplefilter("ignore")
            self.product = pack(weight.float())
            self.product(self.blank)

    def __call__(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[M, outputs] float32 from ``rows`` [M, inputs] float32."""
        count = rows.shape[0]
        rows = rows * self.undo
        if count % HALF_STEP:
            rows = torch.cat([rows, self.blank[count % HALF_STEP :]])
        product = self.product(rows)[:count]
        return product if bias is None else product.add_(bias)


def _by_one_thread(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with rows on one thread, which has less call overhead."""
    packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
    return lambda rows: torch.fbgemm_linear_fp16_weight_fp32_activation(rows, packed, None)


def _by_all_threads(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same product to the bit, with the columns divided among the threads."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda rows: multiply(rows, packed)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer, which is faster when packed.

    Subclasses of Linear (e.g. quantised layers) and modules with a forward or hooks of their own
    may compute something else.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and is_for_cpu(module.weight)
    )


def is_for_cpu(weight: Tensor) -> bool:
    """Whether a CPU pass copies the weight: it is float32, or bfloat16 that is widened."""
    on_cpu = weight.device.type == "cpu" and bool(weight.numel()) and torch._C._has_mkldnn
    return on_cpu and (weight.dtype == torch.float32 or is_to_be_widened(weight))


def is_to_be_widened(tensor: Tensor) -> bool:
    """Whether a tensor is bfloat16 on a processor without bfloat16 products."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and not _multiplies_bfloat16()
    )


def version(weight: Tensor) -> int:
    """The number of in-place writes to a weight; 0 for one created in inference mode."""
    return 0 if weight.is_inference() else weight._version


def _packing_of(weights: list[Tensor]) -> Packing:
    """The packing of one matrix, which tied layers share, or of several stacked ones."""
    if len(weights) > 1:
        return _pack(torch.cat([weight.detach() for weight in weights]))
    (weight,) = weights
    if weight not in _packed or _packed[weight][0] != version(weight):
        _packed[weight] = version(weight), _pack(weight)
    packing: Packing = _packed[weight][1]
    return packing


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return weight.new_zeros(weight.shape[0], dtype=torch.float32)
    return bias.detach().float()


@torch.no_grad()
def _pack(weight: Tensor) -> Packing:
    weight = weight.detach()
    if weight.dtype == torch.float32:
        return _Single(weight)
    half = _in_half_precision(weight) if _has_fbgemm() else None
    return _Single(weight) if half is None else _Half(*half)


def _in_half_precision(weight: Tensor) -> tuple[Tensor, float] | None:
    """The matrix times the power of 2 that fits it into half precision, and that power.

    Half precision has more digits than bfloat16 but a smaller range: None if a weight is too small,
    relative to the largest one, for an exact copy.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return None
    scale = 2.0 ** math.floor(math.log2(HALF_MAX / largest))
    scaled = weight.float() * scale
    half = scaled.half()
    return (half, scale) if torch.equal(half.float(), scaled) else None


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86") and hasattr(
        torch, "fbgemm_linear_fp16_weight_fp32_activation"
    )


def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
