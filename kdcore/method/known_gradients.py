"""A scalar whose gradients are computed chunk by chunk, before its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def known(value: Tensor, gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The value with a graph whose backward pass hands known gradients on.

    Args:
        value: [] the value.
        gradients: Its gradient with respect to each tensor.
        tensors: The tensors.
    """
    attached: Tensor = _Known.apply(value, gradients, *tensors)  # type: ignore[no-untyped-call]
    return attached


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        return None, None, *(grad * scale.to(grad.dtype) for grad in ctx.grads)
