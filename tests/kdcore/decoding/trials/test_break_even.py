"""The break-even acceptance length, by a clock that only the stubs advance."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.decoding.loop import Counter, Stop
from kdcore.evaluation.speed.bench_outcome import Measurement, outcome
from kdcore.evaluation.speed.break_even import break_even
from kdcore.specs.bench import BenchSpec
from kdcore_baselines.drafters.untrained import Nothing
from tests.tiny.drafters import clueless, oracle
from tests.tiny.targets import tiny
from tests.tiny.timed_decoding import Clock, TimedLevels, timed_decoder

DEPTH = 4
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_it_is_the_cost_of_a_round_in_passes(clock: Clock) -> None:
    target = tiny("llama")
    drafter = TimedLevels(clueless(DEPTH, target.config.vocab_size))
    drafter.clock = clock
    plain = timed_decoder(target, Nothing(None, None), clock)
    found = break_even(timed_decoder(target, drafter, clock), plain, [PROMPT, PROMPT], seconds=0)
    assert found.plain_ms == pytest.approx(4250)
    assert found.draft_ms == pytest.approx(2000)
    assert found.verify_ms == pytest.approx(4000 + 250 * (1 + DEPTH))
    assert found.tau == pytest.approx((2 + 4 + 0.25 * 5) / 4.25)
    assert found.rounds >= 1


def test_there_the_loop_is_as_fast_as_without_a_drafter(clock: Clock) -> None:
    target = tiny("llama")
    ids = torch.tensor([PROMPT])
    plain = timed_decoder(target, Nothing(None, None), clock)
    # the plain answer, from which an oracle drafts one token right and the next one wrong
    [answer] = plain.generate(ids, torch.ones_like(ids), Stop(24))
    right = oracle([PROMPT + answer], 2, target.config.vocab_size)
    wrong = oracle([PROMPT + answer], 2, target.config.vocab_size, rank=1)

    def levels(row: list[int]) -> Tensor:
        return torch.stack([right(row)[0], wrong(row)[1]])

    drafter = TimedLevels(levels)
    drafter.clock = clock
    drafted = timed_decoder(target, drafter, clock)
    tau = break_even(drafted, plain, [PROMPT], seconds=0).tau

    counters = []
    for each in (drafted, plain):
        each.counter = Counter()
        for _ in each.stream(ids, torch.ones_like(ids), Stop(20)):
            pass
        counters.append(each.counter)
    ours, theirs = counters
    ours.draft_seconds -= 58  # the first proposal reads the prompt
    seconds = [(c.draft_seconds + c.verify_seconds) / c.emitted for c in (ours, theirs)]
    assert ours.tau == 2.0 and theirs.tau == 1.0
    assert seconds[1] / seconds[0] == pytest.approx(ours.tau / tau)

    # and the benchmark predicts a speed-up of 1 for a drafter that accepts as much as tau
    sets = {"s": {"name": "chat", "path": __file__}}
    asked = {"job": "bench", "target": {"model": "m"}, "methods": {"d": {}}, "baselines": []}
    spec = BenchSpec.model_validate(asked | {"sets": sets})
    first: Any = partial(Measurement, 1, 0.0, 1, "s", 1, 0)
    costs = [{"draft": each.draft_seconds, "verify": each.verify_seconds} for each in counters]
    rounds = [
        first("plain", 1.0, 20, rounds=20, accepted={0: 20}, **costs[1]),
        first("d", 1.0, 20, rounds=10, accepted={1: 10}, **costs[0]),
    ]
    row = next(each for each in outcome(spec, rounds).rows if each.method == "d")
    assert row.predicted == pytest.approx(2.0 / tau)
