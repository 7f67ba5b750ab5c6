"""The gradient's signal-to-noise ratio, DeepKD's measure of how alike a stream's gradients are.

Per parameter (mean gradient)^2 / variance, over mini-batches at fixed parameters. The paper does
not say how it is estimated (arXiv 2505.15133). Here, from M mini-batches with mean g and unbiased
variance s^2, summed over the parameters of a layer:

    sum max(g^2 - s^2 / M, 0) / sum s^2

since the squared mean alone holds s^2 / M of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class GSNR:
    """Takes one stream's gradients, a mini-batch at a time; 16 or more make a fair estimate."""

    def __init__(self) -> None:
        self._batches = 0
        self._mean: list[Tensor] = []
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor]) -> None:
        """One mini-batch's gradients, a tensor for each layer.

        By Welford's update, under which equal gradients leave a variance of exactly 0.
        """
        given = list(gradients)
        if not self._batches:
            self._mean = [torch.zeros_like(gradient) for gradient in given]
            self._squares = [torch.zeros_like(gradient) for gradient in given]
        self._batches += 1
        before = torch._foreach_sub(given, self._mean)
        torch._foreach_add_(self._mean, torch._foreach_div(before, self._batches))
        torch._foreach_addcmul_(self._squares, before, torch._foreach_sub(given, self._mean))

    def ratios(self) -> list[float]:
        """One for each layer: inf for constant gradients, NaN where all are 0.

        Raises ValueError before two mini-batches.
        """
        return [_ratio(*layer) for layer in self._sums()]

    def ratio(self) -> float:
        """That of all layers together, as if they were one; see `ratios`."""
        signals, noises = zip(*self._sums(), strict=True)
        return _ratio(sum(signals), sum(noises))

    def _sums(self) -> list[tuple[float, float]]:
        """Signal and noise of each layer."""
        if self._batches < 2:
            raise ValueError("a variance needs two mini-batches")
        return [self._sum(*layer) for layer in zip(self._mean, self._squares, strict=True)]

    def _sum(self, mean: Tensor, squares: Tensor) -> tuple[float, float]:
        variance = squares.double() / (self._batches - 1)
        signal = (mean.double().square() - variance / self._batches).clamp(min=0)
        return float(signal.sum()), float(variance.sum())


def _ratio(signal: float, noise: float) -> float:
    if noise > 0:
        return signal / noise
    return math.inf if signal > 0 else math.nan
