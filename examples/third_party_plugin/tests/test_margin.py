"""The gate, held to kdcore's conformance kit and to its own formula."""

from typing import ClassVar

import numpy as np

from kdcore import LogitBatch
from kdcore.testing import GateSuite


class TestMargin(GateSuite):
    """Every check of a gate, at the defaults."""

    name = "margin"


class TestMarginWithAFloor(GateSuite):
    """The same where refused positions weigh something, and the formula itself."""

    name = "margin"
    params: ClassVar = {"least": 0.5, "floor": 0.1}

    def test_formula(self) -> None:
        """In float64, from probabilities, the long way round."""

        def weights(batch: LogitBatch) -> np.ndarray:
            probs = np.sort(batch.teacher.softmax(-1).numpy(), axis=-1)
            return np.where(np.log(probs[..., -1] / probs[..., -2]) >= 0.5, 1.0, 0.1)

        self.agrees_with(weights)
