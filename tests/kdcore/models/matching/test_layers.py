"""What matchers get of two models' layers, and what they must return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.errors import UserError
from kdcore.models.matching.layers import LayerAttention, PassLayers, Queries

POSITIONS = 3


class Distance(nn.Module):
    """Returns one number for all positions, as a mean would."""

    pairs = ((1, 1),)

    def __init__(self, given: Any, *, attention: bool) -> None:
        super().__init__()
        self.given, self.attention = given, attention

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Any:
        return self.given


def layers() -> PassLayers:
    queries = Queries((POSITIONS,), torch.arange(POSITIONS))
    read = torch.ones(1, 1, POSITIONS, 2, requires_grad=True)
    attention = LayerAttention(read, read, None, causal=True, scaling=1.0)
    return PassLayers({1: torch.ones(POSITIONS, 4)}, queries, {1: attention})


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("given", [None, torch.tensor(1.0), torch.ones(1)])
def test_a_matcher_that_gives_another_shape_is_refused(given: Any, attention: bool) -> None:
    """A mean over the positions would hide what the gates do."""
    matcher: Any = Distance(given, attention=attention)
    with pytest.raises(
        UserError, match=r"the matcher Distance returned distances of .*, expected .* \[3\]"
    ):
        layers().distance(matcher, layers(), torch.ones(POSITIONS), 8)
