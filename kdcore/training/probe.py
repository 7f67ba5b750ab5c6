"""The gradient probe: signal-to-noise ratios of the terms' gradients, and norms of the momenta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcore.method.protocols import MomentumPolicy
from kdcore.models.device import widened
from kdcore.specs.training import TrainingSpec


@dataclass(frozen=True, slots=True)
class Probe:
    """When the probe runs.

    Attributes:
        every: Optimiser steps between two probes.
        batches: Mini-batches per probe.
    """

    every: int
    batches: int

    @classmethod
    def of(cls, spec: TrainingSpec) -> Probe | None:
        """Return a spec's probe, or None if the spec sets none."""
        return None if spec.probe_every is None else cls(spec.probe_every, spec.probe_batches)


def signal_to_noise(
    losses: Iterable[Mapping[str, Tensor]], parameters: Sequence[nn.Parameter]
) -> dict[str, float]:
    """Measure the gradient signal-to-noise ratio of each term, without touching any ``.grad``.

    Args:
        losses: For each mini-batch, term -> scalar loss.
        parameters: The parameters that the ratio covers together.

    Returns:
        ``gsnr/TERM`` -> ratio; a term whose gradients are all 0, or all equal, is left out.
    """
    ratios: dict[str, GSNR] = {}
    for batch in losses:
        for place, (term, loss) in enumerate(batch.items()):
            more = place + 1 < len(batch)
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=more, allow_unused=True, materialize_grads=True
            )
            ratios.setdefault(term, GSNR()).add(gradients)
    found = {f"gsnr/{term}": ratio.ratio() for term, ratio in ratios.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def momentum_norms(policy: MomentumPolicy) -> dict[str, float]:
    """``momentum_norm/NAME`` -> L2 norm of the buffer; empty if the policy has no ``norms``."""
    norms: Callable[[], Mapping[str, float]] | None = getattr(policy, "norms", None)
    return {f"momentum_norm/{name}": norm for name, norm in norms().items()} if norms else {}


class GSNR:
    """Gradient signal-to-noise ratio of one stream; a fair estimate needs 16 mini-batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._mean: list[Tensor] = []
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add one mini-batch by Welford's update: equal gradients give a variance of exactly 0.

        Args:
            gradients: One tensor for each layer.
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
        """Return the ratio of each layer: inf for constant gradients, NaN where all are 0.

        Raises:
            ValueError: Fewer than two mini-batches were added.
        """
        return [_ratio(*layer) for layer in self._sums()]

    def ratio(self) -> float:
        """Return the ratio of all layers together; see `ratios`."""
        signals, noises = zip(*self._sums(), strict=True)
        return _ratio(sum(signals), sum(noises))

    def _sums(self) -> list[tuple[float, float]]:
        """Signal and noise of each layer."""
        if self._batches < 2:
            raise ValueError("the variance needs at least two mini-batches")
        return [self._sum(*layer) for layer in zip(self._mean, self._squares, strict=True)]

    def _sum(self, mean: Tensor, squares: Tensor) -> tuple[float, float]:
        variance = widened(squares) / (self._batches - 1)
        signal = (widened(mean).square() - variance / self._batches).clamp(min=0)
        return float(signal.sum()), float(variance.sum())


def _ratio(signal: float, noise: float) -> float:
    if noise > 0:
        return signal / noise
    return math.inf if signal > 0 else math.nan
