"""Match hidden states of chosen layers, through a learned projection where the widths differ.

With h the student's and g the teacher's hidden state of a pair, at one position,

    L = sum over pairs of D(W h + b, g),   D = (1/H) sum_i (x_i - g_i)^2 by default

Sources: FitNets, arXiv 1412.6550 (a regressor for a student of another width); TinyBERT,
arXiv 1909.10351, equation 8 (one W for all pairs, and the uniform mapping of layers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import BuildContext, StateSizes, UserError, by_keywords
from kdcore_alignment import params
from kdcore_alignment.pairs import pairs_of


class Hidden(nn.Module):
    """Matcher of hidden states."""

    @by_keywords(params.Hidden)
    def __init__(self, params: params.Hidden, context: BuildContext) -> None:
        super().__init__()
        self.params = params
        self.pairs: tuple[tuple[int, int], ...] = ()
        self.projections = nn.ModuleList()

    def bind(self, student: StateSizes, teacher: StateSizes) -> None:
        wanted = self.params.projection
        self.pairs = pairs_of(self.params.pairs, student.layers, teacher.layers, "hidden")
        if wanted == "never" and student.width != teacher.width:
            raise UserError(
                "matcher 'hidden' has projection: never, but the hidden states of the student have "
                f"width {student.width} and those of the teacher {teacher.width}",
                "set projection: where_needed",
            )
        if wanted == "always" or student.width != teacher.width:
            count = 1 if self.params.shared else len(self.pairs)
            self.projections.extend(nn.Linear(student.width, teacher.width) for _ in range(count))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        distances = [
            self._distance(self._projected(place, ours.float()), theirs.float())
            for place, (ours, theirs) in enumerate(zip(student, teacher, strict=True))
        ]
        return torch.stack(distances).sum(0)

    def _projected(self, place: int, states: Tensor) -> Tensor:
        if not len(self.projections):
            return states
        projected: Tensor = self.projections[0 if self.params.shared else place](states)
        return projected

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.params.distance == "cosine":
            return 1 - F.cosine_similarity(ours, theirs, dim=-1)
        distance = F.mse_loss if self.params.distance == "mse" else F.smooth_l1_loss
        return distance(ours, theirs, reduction="none").mean(-1)
