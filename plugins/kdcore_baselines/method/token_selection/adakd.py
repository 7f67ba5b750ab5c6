"""AdaKD (arXiv 2510.11615): distil at hard positions, with a lower temperature at harder ones.

The difficulty s of a position is the Hellinger distance of teacher and student. A fraction r of the
hardest positions is kept, and r follows the loss (loss-driven adaptive token focusing). With m, the
median difficulty of the kept positions, each has the temperature

    exp(-strength * tanh(log(s / m)))         (inverse difficulty temperature scaling)

Both as in the released code; the update of r is `AdaKD.step_done`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcore import by_keywords
from kdcore_baselines.method.gates import hellinger_distance, highest
from kdcore_baselines.method.token_selection.components import AdaKDParams

if TYPE_CHECKING:
    from kdcore import BuildContext, LogitBatch


class AdaKD:
    """Ranked gate that keeps the hardest positions and sets a temperature for each."""

    @by_keywords(AdaKDParams)
    def __init__(self, params: AdaKDParams, context: BuildContext) -> None:
        self.params = params
        self.fraction = params.start
        self.mean = 0.0
        """Running mean of the distillation loss; 0 before the first step."""
        self.settled = 0.0
        """Running mean at the last change of the fraction; 0 during the warm-up."""

    def score(self, batch: LogitBatch) -> Tensor:
        return hellinger_distance(batch)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return highest(scores, int(self.fraction * len(scores)))

    def temperatures(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Compute the factors [N] of the loss temperature, relative to the kept positions.

        tanh(log(s / m)) is (s^2 - m^2) / (s^2 + m^2), which is defined where m is 0.
        """
        if not weights.any():
            return torch.ones_like(scores)
        median = scores[weights > 0].median()
        total = scores**2 + median**2
        hardness = torch.where(total > 0, (scores**2 - median**2) / total, 0.0)
        return torch.exp(-self.params.strength * hardness)

    def step_done(self, metrics: Mapping[str, float]) -> None:
        loss, params = metrics["distilled"], self.params
        self.mean = params.decay * self.mean + (1 - params.decay) * loss if self.mean else loss
        if not self.settled:
            self.settled = self.mean if metrics["progress"] > params.warmup else 0.0
            return
        fallen = self.settled - self.mean
        if abs(fallen) <= params.tolerance * self.settled:
            return
        self.settled = self.mean
        wanted = self.fraction * (1 - params.step if fallen > 0 else 1 + params.step)
        self.fraction = min(1.0, max(params.least, wanted)) if params.step else self.fraction

    def state_dict(self) -> dict[str, Tensor]:
        state = {"fraction": self.fraction, "mean": self.mean, "settled": self.settled}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.fraction, self.mean, self.settled = (
            state[name].item() for name in ("fraction", "mean", "settled")
        )
