"""A small student with a loss for each term, and an optimizer with a momentum for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from kdcore import MomentumOptimizer
from kdcore_deepkd import DeepKDMomentum

TERMS = ("task", "target", "non_target")


class Student(nn.Module):
    """A layer that learns, one that is frozen, and a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.frozen = nn.Linear(4, 3), nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self, step: int, terms: Sequence[str] = TERMS) -> dict[str, Tensor]:
        rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        out = self.frozen(self.layer(rows))
        return {term: (out - place).square().mean() for place, term in enumerate(terms)}


def begun(student: Student, **keywords: Any) -> MomentumOptimizer:
    return MomentumOptimizer(SGD(student.parameters(), lr=0.1), DeepKDMomentum(**keywords))


def same(one: Student, other: Student) -> bool:
    return all(torch.equal(value, other.state_dict()[k]) for k, value in one.state_dict().items())
