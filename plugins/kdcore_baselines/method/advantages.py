"""MiniLLM (arXiv 2306.08543): the reverse KL of whole responses, by policy gradient.

With r_t = log p(y_t) - log q(y_t) of teacher p and student q, and rho_t the importance of the
sampled token y_t (its probability under q divided by that under what sampled it),

    A_t = sum over t' > t of gamma^(t' - t - 1) r_t'  /  number of these t'

where min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) has a gradient, and 0 elsewhere. The reward
of the token itself is left to the term ``kd`` with the reverse KL: the single-step decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kdcore import by_keywords
from kdcore_baselines.method import params

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore import BuildContext, SampledTokens


class MiniLLM:
    """Advantage: the mean reward of the tokens that follow."""

    @by_keywords(params.MiniLLM)
    def __init__(self, params: params.MiniLLM, context: BuildContext) -> None:
        self.params = params

    def __call__(self, tokens: SampledTokens) -> Tensor:
        own, length_norm, clip = self.params.own, self.params.length_norm, self.params.clip
        rewards = (tokens.teacher - tokens.student).where(tokens.mask, 0.0)
        advantage = _discounted_sums(rewards, self.params.gamma)
        count = _discounted_sums(tokens.mask.to(rewards.dtype), 1.0)
        if not own:
            advantage, count = _later(advantage, 1), _later(count, 1)
        if length_norm:
            advantage = advantage / count.clamp(min=1)
        if clip is None:
            return advantage
        ratio = tokens.importance
        inside = torch.where(advantage > 0, ratio <= 1 + clip, ratio >= 1 - clip)
        return advantage.where(inside, 0.0)


def _discounted_sums(values: Tensor, gamma: float) -> Tensor:
    """Sum gamma^(t' - t) values_t' over t' >= t, in log2(T) passes; all [B, T]."""
    reached = 1
    while reached < values.shape[1]:
        values = values + gamma**reached * _later(values, reached)
        reached *= 2
    return values


def _later(values: Tensor, steps: int) -> Tensor:
    """The values [B, T] of ``steps`` positions later; 0 beyond the end."""
    return F.pad(values[:, steps:], (0, steps))
