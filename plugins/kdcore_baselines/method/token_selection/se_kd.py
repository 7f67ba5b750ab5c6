"""SE-KD (arXiv 2602.01395): distil at the positions of a row where the student is least sure.

    m_t = 1 where H(student_t) >= threshold, which ceil(k n) of the row's n positions reach

A window below the highest entropies is the curriculum of the released code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from kdcore import by_keywords
from kdcore.method.schedule import value_at
from kdcore_baselines.method.gates import entropy_of
from kdcore_baselines.method.token_selection.components import SEKDParams

if TYPE_CHECKING:
    from kdcore import BuildContext, LogitBatch


class SEKD:
    """Ranked gate that keeps a window of each row's positions, sorted by student entropy."""

    teacher_classes = 0
    within_rows = True

    @by_keywords(SEKDParams)
    def __init__(self, params: SEKDParams, context: BuildContext) -> None:
        self.fraction = params.fraction
        self.window = params.window

    def score(self, batch: LogitBatch) -> Tensor:
        return entropy_of(batch.student)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        if not len(scores):
            return scores
        kept = math.ceil(value_at(self.fraction, progress) * len(scores))
        first = math.floor((len(scores) - kept) * value_at(self.window, progress))
        ascending = scores.sort().values
        low, high = ascending[first], ascending[first + kept - 1]
        return ((scores >= low) & (scores <= high)).to(scores.dtype)
