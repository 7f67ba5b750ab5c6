"""A teacher's distribution kept as its best classes and the mass of the others; made dense again.

At each position: the ids of the k likeliest classes, the likeliest first; the log-probs of all of
them but the first, which follows, since all probabilities add up to 1; and the log of the tail, the
mass that the other V - k classes have together. Log-probs are never positive, so their sign is
free: it is plus where a class is exactly as likely as the one before it, which rounding to float16
would hide from a gate that counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_LOWEST = torch.finfo(torch.float16).min
_RANK = 2.0**-22
"""Relative step that keeps classes of equal float16 log-probs in their order: two float32 ulps."""

Best: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Ids [N, k], signed log-probs [N, k - 1] and tail [N], as they are stored."""


@dataclass(frozen=True, slots=True)
class CachedLogits:
    """Teacher logits of N masked positions, as `kdcore.method.logits.HiddenLogits` gives them.

    ids: [N, k] int64; logp: [N, k - 1] and tail: [N] as stored, float32. The best k classes have
    their log-probs; each other one has log(exp(tail) / (V - k)), the tail spread evenly.
    With r the live teacher, c this one, r' and c' their tails renormalised and m the tail's mass,
    KL(r || c) = m KL(r' || uniform) <= m log(V - k), up to float16's rounding.
    """

    ids: Tensor
    logp: Tensor
    tail: Tensor
    classes: int

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 log-probs of a chunk."""
        ids, tail = self.ids[chunk], self.tail[chunk]
        rest = -self.logp[chunk].abs()
        tied = ~self.logp[chunk].signbit()
        others = rest.exp().sum(-1) + tail.exp()
        first = torch.log1p(-others.clamp(max=1)).maximum(rest[:, 0])  # rounding keeps the order
        first = torch.where(tied[:, 0], rest[:, 0], first)
        rank = F.pad((~tied).cumsum(-1), (1, 0))
        best = torch.cat([first[:, None], rest], 1) * (1 + rank * _RANK)
        below = torch.nextafter(best[:, -1], torch.full_like(tail, -torch.inf))
        each = (tail - math.log(max(1, self.classes - ids.shape[1]))).minimum(below)
        return each[:, None].repeat(1, self.classes).scatter_(1, ids, best)


def best_classes(logits: Tensor, k: int) -> Best:
    """Of logits [N, V]."""
    logp = logits.log_softmax(-1)
    best, ids = logp.topk(k)
    return _stored(ids, best, logp.scatter(1, ids, -torch.inf).logsumexp(-1))


def packed(ids: Tensor, best: Tensor) -> Best:
    """Of the ids and log-probs [N, k] of the best classes alone, the likeliest first."""
    rest = torch.log1p(-best.double().exp().sum(-1).clamp(max=1)).float()
    return _stored(ids, best, rest)


def _stored(ids: Tensor, best: Tensor, tail: Tensor) -> Best:
    rest = best[:, 1:].clamp(min=_LOWEST)
    signed = torch.where(best[:, 1:] == best[:, :-1], -rest, -rest.abs())
    return ids, signed.half(), tail.clamp(min=_LOWEST, max=0).half()
