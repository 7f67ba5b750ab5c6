"""SE-KD (arXiv 2602.01395): distil at the positions of a row where the student is least sure.

    m_t = 1 where H(student_t) >= threshold

The threshold is one that ceil(k n) of the row's n positions reach or, with a queue, the quantile
1 - k of the last entropies of earlier steps (global-level selection). A window below the highest
entropies is the curriculum of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcore import by_keywords
from kdcore.method.schedule import value_at
from kdcore_baselines.method.gates import entropy_of
from kdcore_baselines.method.token_selection.components import SEKDParams, SEKDQueueParams

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
        return _window(scores, value_at(self.fraction, progress), value_at(self.window, progress))


class SEKDQueue:
    """Ranked gate whose threshold is a quantile of the entropies of earlier steps."""

    teacher_classes = 0
    within_rows = True  # in the first step

    @by_keywords(SEKDQueueParams)
    def __init__(self, params: SEKDQueueParams, context: BuildContext) -> None:
        self.fraction, self.capacity = params.fraction, params.queue
        self.queue = torch.empty(0)
        """The last entropies, at most ``capacity``, the oldest first."""

    def score(self, batch: LogitBatch) -> Tensor:
        return entropy_of(batch.student)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        share = value_at(self.fraction, progress)
        if not len(self.queue):
            return _window(scores, share, 1.0)
        return (scores >= self.queue.to(scores).quantile(1 - share)).to(scores.dtype)

    def remember(self, scores: Tensor) -> None:
        self.queue = torch.cat([self.queue.to(scores), scores])[-self.capacity :]

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """Learn nothing: `remember` gets the scores of the step."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.queue}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.queue = state["queue"]


def _window(scores: Tensor, share: float, place: float) -> Tensor:
    """[n] 1 for a share of the scores, at a place of their order from 0 (lowest) to 1."""
    if not len(scores):
        return scores
    kept = math.ceil(share * len(scores))
    first = math.floor((len(scores) - kept) * place)
    ascending = scores.sort().values
    low, high = ascending[first], ascending[first + kept - 1]
    return ((scores >= low) & (scores <= high)).to(scores.dtype)
