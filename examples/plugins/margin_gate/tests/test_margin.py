"""Tests of the gate: kdcore's conformance checks and the formula."""

from typing import ClassVar

import numpy as np

from kdcore import LogitBatch
from kdcore.testing import GateSuite


class TestMargin(GateSuite):
    """Conformance checks of a gate, with the default parameters."""

    name = "margin"


class TestMarginWithAFloor(GateSuite):
    """Conformance checks with a floor, and the formula."""

    name = "margin"
    params: ClassVar = {"least": 0.5, "floor": 0.1}

    def test_formula(self) -> None:
        """The weights match a reference in float64, from probabilities."""

        def weights(batch: LogitBatch) -> np.ndarray:
            probs = np.sort(batch.teacher.softmax(-1).numpy(), axis=-1)
            return np.where(np.log(probs[..., -1] / probs[..., -2]) >= 0.5, 1.0, 0.1)

        self.agrees_with(weights)
