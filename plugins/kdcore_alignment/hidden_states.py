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


class Hidden(nn.Module):
    """Matcher of hidden states."""

    @by_keywords(params.Hidden)
    def __init__(self, params: params.Hidden, context: BuildContext) -> None:
        super().__init__()
        self.params = params
        self.pairs: tuple[tuple[int, int], ...] = ()
        self.projections = nn.ModuleList()

    def bind(self, student: StateSizes, teacher: StateSizes) -> None:
        given, wanted = self.params.pairs, self.params.projection
        if given is None:
            every = range(student.layers + 1)
            self.pairs = tuple((m, m * teacher.layers // student.layers) for m in every)
        else:
            self.pairs = tuple(
                (number_of(ours, student, "student"), number_of(theirs, teacher, "teacher"))
                for ours, theirs in given
            )
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


def number_of(number: int, sizes: StateSizes, whose: str) -> int:
    """The number of a hidden state, where a negative one counts from the end.

    Args:
        number: The number in a spec.
        sizes: The sizes of the model.
        whose: What the message calls the model.

    Returns:
        The number from 0.

    Raises:
        UserError: The model does not have this hidden state.
    """
    found = number + sizes.layers + 1 if number < 0 else number
    if not 0 <= found <= sizes.layers:
        raise UserError(
            f"matcher 'hidden' names hidden state {number} of the {whose}, which has 0 to "
            f"{sizes.layers}",
            f"write pairs: [[STUDENT, TEACHER], ...] with 0 to {sizes.layers} for the {whose}, or "
            f"-{sizes.layers + 1} to -1",
        )
    return found
