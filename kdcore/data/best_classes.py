"""A teacher's distribution stored as its top-k classes and the mass of the tail.

Each position stores the ids of the k most likely classes in descending order, their log-probs
without the first one (it follows, since all probabilities sum to 1), and the log of the tail: the
total mass of the other V - k classes. Log-probs are never positive, so their sign is free: a plus
marks a class that is exactly as likely as the one before it. Rounding to float16 would hide that
tie from a gate that counts classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.objective import Objective

_LOWEST = torch.finfo(torch.float16).min
_RANK = 2.0**-22
"""Relative step that keeps the order of classes with equal float16 log-probs: two float32 ulps."""

Best: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Ids [N, k], signed log-probs [N, k - 1] and tail [N], in their stored form."""


@dataclass(frozen=True, slots=True)
class CachedLogits:
    """Cached teacher logits of N masked positions: a `kdcore.method.logits.TeacherLogits`.

    The top k classes have their log-probs; each other class has log(exp(tail) / (V - k)), an equal
    share of the tail. With r the live teacher, c this one, r' the renormalised tail of r and m its
    mass, KL(r || c) = m KL(r' || uniform) <= m log(V - k), up to the rounding to float16.

    Attributes:
        ids: [N, k] int64, class ids in descending order of probability.
        logp: [N, k - 1] float32, the stored log-probs.
        tail: [N] float32, the stored log mass of the tail.
        classes: Number of classes V.
    """

    ids: Tensor
    logp: Tensor
    tail: Tensor
    classes: int

    def logits(self, chunk: slice) -> Tensor:
        """Dense log-probs of a chunk of the positions.

        Args:
            chunk: The chunk, of C positions.

        Returns:
            [C, V] float32 log-probs.
        """
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


def refuse_more_classes(objective: Objective, k: int, classes: int, source: str, cure: str) -> None:
    """Check that a teacher's top classes are enough for the components of a method.

    A gate without ``teacher_classes`` needs all classes. A splitter or a divergence without it
    works with the uniform tail.

    Args:
        objective: The method.
        k: Number of the teacher's top classes.
        classes: Number of classes V.
        source: Subject and verb of what gives the top classes, in the message.
        cure: Beginning of the cure in the message.

    Raises:
        UserError: A component needs more of the teacher's classes.
    """
    looks = {f"gate '{name}'": _looks_at(gate, None) for name, gate in objective.gates.items()}
    looks |= {f"splitter {n}": _looks_at(each, 0) for n, each in enumerate(objective.splitters)}
    looks["the divergence"] = _looks_at(objective.divergence, 0)
    parts = objective.part_divergences
    looks |= {f"the divergence of '{part}'": _looks_at(each, 0) for part, each in parts.items()}
    for name, number in looks.items():
        needed = classes if number is None else number
        if needed > k:
            raise UserError(
                f"{name} needs {'all' if number is None else 'the top'} {needed} classes of the "
                f"teacher, but {source} the top {k}",
                f"{cure}, or choose a gate that needs fewer classes, e.g. speckd with "
                "verification: greedy",
            )


def _looks_at(component: Any, unsaid: int | None) -> int | None:
    found: int | None = getattr(component, "teacher_classes", unsaid)
    return found


def best_classes(logits: Tensor, k: int) -> Best:
    """Encode dense logits.

    Args:
        logits: [N, V] logits.
        k: Number of classes to keep, 2 to V.

    Returns:
        The top k classes in their stored form.
    """
    logp = logits.log_softmax(-1)
    best, ids = logp.topk(k)
    return _stored(ids, best, logp.scatter(1, ids, -torch.inf).logsumexp(-1))


def packed(ids: Tensor, best: Tensor) -> Best:
    """Encode log-probs that cover the top k classes only.

    Args:
        ids: [N, k] class ids in descending order of probability.
        best: [N, k] their log-probs.

    Returns:
        The classes in their stored form.
    """
    rest = torch.log1p(-best.double().exp().sum(-1).clamp(max=1)).float()
    return _stored(ids, best, rest)


def _stored(ids: Tensor, best: Tensor, tail: Tensor) -> Best:
    rest = best[:, 1:].clamp(min=_LOWEST)
    signed = torch.where(best[:, 1:] == best[:, :-1], -rest, -rest.abs())
    return ids, signed.half(), tail.clamp(min=_LOWEST, max=0).half()
