"""How alike a term's gradients are, and how large the momenta: looked at while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcore.gsnr import GSNR
from kdcore.protocols import MomentumPolicy
from kdcore.specs import TrainingSpec


@dataclass(frozen=True, slots=True)
class Probe:
    """When to look, in optimiser steps, and at how many mini-batches."""

    every: int
    batches: int

    @classmethod
    def of(cls, spec: TrainingSpec) -> Probe | None:
        """What a spec asks for."""
        return None if spec.probe_every is None else cls(spec.probe_every, spec.probe_batches)


def signal_to_noise(
    losses: Iterable[Mapping[str, Tensor]], parameters: Sequence[nn.Parameter]
) -> dict[str, float]:
    """``gsnr/TERM`` -> the ratio (`kdcore.gsnr`) of a term's gradients, of all parameters together.

    losses: of each mini-batch, a scalar for each term. No ``.grad`` is touched. A term whose
    gradients are all 0, or all alike, has no ratio and is left out.
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
    """``momentum_norm/NAME`` -> the L2 norm of each buffer, of a policy that tells."""
    norms: Callable[[], Mapping[str, float]] | None = getattr(policy, "norms", None)
    return {f"momentum_norm/{name}": norm for name, norm in norms().items()} if norms else {}
