"""Implementation of the gate, imported only when a run uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcore import by_keywords
from margin_gate.plugin import MarginParams

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore import BuildContext, LogitBatch


class Margin:
    """Gate with weight 1 where the teacher's log p(first) - log p(second) is at least `least`.

    The difference of two log-probs equals that of their logits, since the normaliser cancels.
    """

    @by_keywords(MarginParams)
    def __init__(self, params: MarginParams, context: BuildContext) -> None:
        self.least = params.least
        self.floor = params.floor

    def __call__(self, batch: LogitBatch) -> Tensor:
        first_BT, second_BT = batch.teacher.topk(2).values.unbind(-1)
        kept_BT = (first_BT - second_BT >= self.least).to(batch.student.dtype)
        return kept_BT + (1 - kept_BT) * self.floor
