"""What is told of a training while it runs."""

from __future__ import annotations

import pytest

from kdcore.training.trainer.figures import IdleGates


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_a_gate_that_accepts_nothing_is_told_once_and_soon(steps: int) -> None:
    told: list[tuple[int, str]] = []
    now = 0
    gates = IdleGates(lambda line: told.append((now, line)))
    for now in range(1, steps + 1):
        accepted = 0.5 if now == 2 else 0.0
        gates.add({"loss": 1.0, "acceptance/entropy": 0.0, "acceptance/speckd": accepted})
    gates.close()
    ((when, line),) = told
    assert when == min(steps, 10)
    assert f"gate entropy accepted no token in the first {when} steps" in line
