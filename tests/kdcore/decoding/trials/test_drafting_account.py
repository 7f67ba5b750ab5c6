"""When the loop drafts: by an account of its own, and by a clock that only the stubs advance."""

from __future__ import annotations

import functools
from random import Random

import pytest
import torch
from torch import Tensor

from kdcore.decoding.loop import Counter, Stop
from kdcore.decoding.trials.drafting_account import MOST, REFRESH, SHARE, TRIAL, DraftingAccount
from kdcore_baselines.trees import Backbone
from tests.tiny.drafters import clueless, oracle
from tests.tiny.targets import generated, tiny
from tests.tiny.timed_decoding import PLAIN, Clock, TimedLevels, timed_decoder

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
COUNT = 320
DEPTH = 3
LONG = tiny("llama", max_position_embeddings=512)


def rounds(account: DraftingAccount, tokens: float, seconds: float, count: int) -> list[bool]:
    """Rounds with drafts of some tokens and seconds, where a plain pass takes a second."""
    asked = []
    for _ in range(count):
        asked.append(account.asks())
        taken = (round(tokens * 10), seconds) if asked[-1] else (10, 1.0)
        account.learn(asked[-1], [taken[0] / 10], taken[1])
    return asked


@pytest.mark.parametrize("seconds", [1.1, 1.5, 3.0, 20.0])
def test_what_drafting_loses_is_bounded(seconds: float) -> None:
    account = DraftingAccount()
    account.start(1)
    asked = rounds(account, 1.0, seconds, 3000)
    drafted, plain = sum(asked), 3000 - sum(asked)
    uncharged = 1 + TRIAL
    lost = (drafted - uncharged) * (seconds - 1)
    assert lost <= MOST + SHARE * plain + seconds
    assert any(asked[-1000:]), "it looks again"


def test_a_drafter_that_pays_is_asked_but_for_a_plain_pass_now_and_then() -> None:
    account = DraftingAccount()
    account.start(1)
    asked = rounds(account, 2.0, 1.5, 3 + 10 * (REFRESH + 1))
    assert asked.count(False) == 3 + 10
    assert asked[:4] == [False, False, False, True]


def test_one_slow_round_is_not_charged_in_full() -> None:
    account = DraftingAccount()
    account.start(1)
    rounds(account, 2.0, 1.5, 20)
    account.learn(True, [2], 1000.0)
    assert account.balance > 0
    account.start(1)
    account.learn(True, [2], 60.0)  # reads the prompt
    assert account.balance > 0


def test_the_same_noise_with_and_without_drafts_stops_nothing() -> None:
    """Heavy tails: a fifth of all rounds take ten times as long, of plain passes too."""
    account, random = DraftingAccount(), Random(1)
    account.start(1)
    asked = []
    for _ in range(2000):
        asked.append(account.asks())
        slow = 10.0 if random.random() < 0.2 else 1.0
        account.learn(asked[-1], [1.5 if asked[-1] else 1], slow)
    assert sum(asked) > 1300


def test_it_keeps_its_balance_over_answers_and_its_times_by_batch_size() -> None:
    account = DraftingAccount()
    account.start(1)
    rounds(account, 1.0, 3.0, 200)
    assert not account.asks()
    account.start(4)
    assert not account.asks()
    rounds(account, 1.0, 3.0, 100)
    account.start(1)
    before = account.balance
    account.learn(True, [2], 1.0)  # at once: the times of this size are known
    assert account.balance == pytest.approx(before + 1)


def spent(levels: object, clock: Clock, takes: float = 2.0) -> tuple[float, Counter]:
    """Seconds and counts of a long answer, less the minute for the prompt."""
    drafter = TimedLevels(levels, Backbone(k=1))  # type: ignore[arg-type]
    drafter.clock, drafter.takes = clock, takes
    drafter.tree.account = DraftingAccount()
    decoder = timed_decoder(LONG, drafter, clock)
    clock.now = 0.0
    ids = torch.tensor([PROMPT])
    answer = decoder.generate(ids, torch.ones_like(ids), Stop(COUNT))
    assert answer == [whole()[0][len(PROMPT) :]]
    return clock.now - 60.0 - 4.0 - 0.25 * (len(PROMPT) - 1), decoder.counter


@pytest.mark.parametrize("takes", [0.0, 2.0, 50.0])
def test_an_answer_with_a_wrong_drafter_takes_little_longer(clock: Clock, takes: float) -> None:
    seconds, counter = spent(clueless(DEPTH, LONG.config.vocab_size), clock, takes)
    drafted = takes + PLAIN + 0.25 * DEPTH
    uncharged = (2 + TRIAL) * drafted
    assert seconds <= (1 + SHARE) * COUNT * PLAIN + MOST * PLAIN + uncharged
    assert counter.undrafted > COUNT / 2


def test_a_right_drafter_is_asked_all_the_time(clock: Clock) -> None:
    right = oracle(whole(), DEPTH, LONG.config.vocab_size)
    seconds, counter = spent(right, clock)
    assert counter.undrafted <= 5
    assert seconds < COUNT * PLAIN / 2


def test_a_stretch_where_drafting_pays_is_found(clock: Clock) -> None:
    """The drafter is right in the second half of the text alone."""
    right = oracle(whole(), DEPTH, LONG.config.vocab_size)
    wrong = clueless(DEPTH, LONG.config.vocab_size)
    turn, begun = len(PROMPT) + COUNT // 2, []

    def levels(row: list[int]) -> Tensor:
        begun.append(len(row))
        return (right if len(row) >= turn else wrong)(row)

    seconds, counter = spent(levels, clock)
    assert next(place for place in begun if place >= turn) - turn < 60
    assert counter.accepted[DEPTH] > 0.8 * (COUNT / 2 - 60) / (DEPTH + 1)
    first, second = COUNT / 2 * PLAIN, (COUNT / 2 - 60) * PLAIN / 2
    assert seconds < (1 + SHARE) * first + 60 * PLAIN + second + MOST * PLAIN


@functools.cache
def whole() -> list[list[int]]:
    return [PROMPT + generated(LONG, [PROMPT], COUNT)[0]]
