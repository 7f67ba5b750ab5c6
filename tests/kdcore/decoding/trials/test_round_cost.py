"""The cost of a round: on a line between measurements, which leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding.trials.round_cost import ROWS, RoundCost, measured_cost
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import tiny


def test_between_and_beyond_the_measured_sizes_the_cost_is_on_a_line() -> None:
    cost = RoundCost(draft=1.0, rows=(1, 4, 8), verify=(2.0, 5.0, 6.0))
    found = {rows: cost(rows) for rows in (1, 2, 4, 6, 8, 16)}
    assert found == pytest.approx({1: 3.0, 2: 4.0, 4: 6.0, 6: 6.5, 8: 7.0, 16: 9.0})
    falls = RoundCost(draft=1.0, rows=(1, 4, 8), verify=(2.0, 6.0, 5.0))
    assert [falls(6), falls(8), falls(800)] == pytest.approx([6.5, 6.0, 7.0])


@pytest.mark.parametrize("limit", [32, 64, 256])  # also fewer than the largest pass has rows
def test_a_measurement_is_positive_and_changes_no_output(limit: int) -> None:
    target, prompt = tiny("llama", max_position_embeddings=limit), torch.arange(1, 9)[None]
    drafter = Nothing(None, None)
    decoder = Decoder(target, drafter, Greedy(None, None))
    before = decoder.generate(prompt, torch.ones_like(prompt), Stop(8))
    cost = measured_cost(Session(target, drafter.layers), drafter)
    assert cost.rows == ROWS and min(cost.verify) > 0 and cost.draft > 0
    assert decoder.generate(prompt, torch.ones_like(prompt), Stop(8)) == before
