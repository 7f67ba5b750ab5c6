"""The gradient probe: signal-to-noise ratios of the terms' gradients, and norms of the momenta."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcore.method.protocols import MomentumPolicy
from kdcore.models.device import widened
from kdcore.specs.parts.training import TrainingSpec


@dataclass(frozen=True, slots=True)
class Probe:
    """When the probe runs.

    Attributes:
        every: Optimizer steps between two probes.
        batches: Mini-batches per probe.
        layers: Whether the ratio of each layer is measured too.
    """

    every: int
    batches: int
    layers: bool = False

    @classmethod
    def of(cls, spec: TrainingSpec) -> Probe | None:
        """Return a spec's probe, or None if the spec sets none."""
        if spec.probe_every is None:
            return None
        return cls(spec.probe_every, spec.probe_batches, spec.probe_layers)


def signal_to_noise(
    losses: Iterable[Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
    *,
    layers: bool = False,
) -> dict[str, float]:
    """Measure the gradient signal-to-noise ratio of each term, without touching any ``.grad``.

    Args:
        losses: Scalar loss by term, for each mini-batch.
        parameters: Parameters by name, which the ratio covers together.
        layers: Whether the ratio of each layer (see `layer_of`) is measured too.

    Returns:
        The ratios by ``gsnr/TERM``, and with ``layers`` by ``gsnr_layer/TERM/LAYER``. A ratio is
        left out if its gradients are all 0, or all equal.
    """
    ratios: dict[str, GSNR] = {}
    for batch in losses:
        for place, (term, loss) in enumerate(batch.items()):
            more = place + 1 < len(batch)
            gradients = torch.autograd.grad(
                loss,
                list(parameters.values()),
                retain_graph=more,
                allow_unused=True,
                materialize_grads=True,
            )
            ratios.setdefault(term, GSNR()).add(gradients)
    found = {f"gsnr/{term}": ratio.ratio() for term, ratio in ratios.items()}
    if layers:
        named = [layer_of(name) for name in parameters]
        for term, ratio in ratios.items():
            by_layer = ratio.by_layer(named)
            found |= {f"gsnr_layer/{term}/{layer}": value for layer, value in by_layer.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: its name up to the first number, or else its module.

    Args:
        parameter: Name, such as ``model.layers.3.mlp.up_proj.weight``.

    Returns:
        A name such as ``model.layers.3``, or ``model.embed_tokens``.
    """
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", parameter)
    return numbered[0] if numbered else parameter.rpartition(".")[0] or parameter


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
            gradients: One tensor for each parameter.
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
        """Return the ratio of each tensor: inf for constant gradients, NaN where all are 0.

        Raises:
            ValueError: Fewer than two mini-batches were added.
        """
        return [_ratio(*sums) for sums in self._sums()]

    def ratio(self) -> float:
        """Return the ratio of all tensors together; see `ratios`."""
        return self.by_layer([""] * len(self._mean))[""]

    def by_layer(self, layers: Sequence[str]) -> dict[str, float]:
        """Return the ratio of each layer; see `ratios`.

        Args:
            layers: Layer of each tensor.

        Returns:
            The ratios by layer.
        """
        signal: dict[str, float] = {}
        noise: dict[str, float] = {}
        for layer, (of_mean, variance) in zip(layers, self._sums(), strict=True):
            signal[layer] = signal.get(layer, 0.0) + of_mean
            noise[layer] = noise.get(layer, 0.0) + variance
        return {layer: _ratio(signal[layer], noise[layer]) for layer in signal}

    def _sums(self) -> list[tuple[float, float]]:
        """The signal, without the part of the noise that the mean contains, and the noise."""
        if self._batches < 2:
            raise ValueError("the variance needs at least two mini-batches")
        return [self._sum(*tensor) for tensor in zip(self._mean, self._squares, strict=True)]

    def _sum(self, mean: Tensor, squares: Tensor) -> tuple[float, float]:
        variance = widened(squares) / (self._batches - 1)
        signal = widened(mean).square() - variance / self._batches
        return float(signal.sum()), float(variance.sum())


def _ratio(signal: float, noise: float) -> float:
    """Clamp the sum, not its summands: of pure noise half the summands are above 0."""
    if noise > 0:
        return max(signal, 0.0) / noise
    return math.inf if signal > 0 else math.nan
