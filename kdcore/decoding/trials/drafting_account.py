"""An account of what drafting gains over plain decoding, by which the loop stops and resumes it.

The unit is the time of a plain pass, which emits one token of each row. With t the seconds of a
round, t_0 those of a plain pass, and n the mean number of tokens that an unfinished row emitted:

    balance += n - t / t_0      after a round that asked the drafter
    balance += 1 / 20           after a plain pass

The drafter is asked while the balance is positive. It never exceeds `MOST`, so what drafting loses
is at most the time of `MOST` passes and 5 % of the plain ones, however often the drafter is wrong.
A drafter that loses little is asked often, one that loses much seldom, and each is asked on as soon
as its rounds gain. Not charged are the drafter's reading of the prompt, the rounds of a trial at
first, and most of a single slow round. The first three rounds are plain: t_0 is the mean of the
last two, and later of the last four plain passes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

SHARE = 1 / 20
"""Passes that drafting may lose for each plain pass."""
MOST = 8.0
"""Largest balance in passes. It lasts over some unlucky rounds of a drafter that pays."""
LEAST = -50.0
"""Smallest balance, which ends a pause after 1,000 passes even if a drafter is very slow."""
TRIAL = 4
"""Number of rounds with drafts that are timed before others are charged. The first pass of each
size may be slow, e.g. where it is compiled."""
SLOW = 3.0
"""Multiple of the median time that a single round counts at most, with drafts and without: other
load on the machine, or a compilation, is not the drafter's."""
REFRESH = 64
"""Number of rounds with drafts after which a plain pass is timed again: it grows with the text."""


@dataclass(slots=True)
class _Times:
    """Seconds of the last rounds of one batch size."""

    warm: bool = False  # whether there was a plain pass, which is not timed
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=4))
    drafted: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    since: int = 0  # rounds with drafts since the last plain pass


class DraftingAccount:
    """Decides for each round whether the drafter is asked, from the rounds before.

    It keeps its balance over several answers, and times by batch size.

    Attributes:
        balance: Passes that drafting may still lose.
    """

    def __init__(self) -> None:
        self.balance = MOST
        self._by_size: dict[int, _Times] = {}
        self._times = _Times()
        self._first = True

    def start(self, rows: int) -> None:
        """Begin B new rows, whose first proposal reads the prompts and is charged like others.

        Args:
            rows: Number of rows B.
        """
        self._times = self._by_size.setdefault(rows, _Times())
        self._first = True

    def asks(self) -> bool:
        """Whether the next round asks the drafter for a proposal."""
        times = self._times
        if len(times.plain) < 2 or times.since >= REFRESH:
            return False
        return self.balance > 0

    def learn(self, asked: bool, emitted: Iterable[int], seconds: float) -> None:
        """Enter a round.

        Args:
            asked: Whether the drafter was asked.
            emitted: Number of tokens of each row that was not done, at least one row.
            seconds: Time of the proposal and of the pass.
        """
        times = self._times
        if not asked:
            if times.warm:
                times.plain.append(seconds)
            times.warm, times.since = True, 0
            self._add(SHARE)
            return
        times.since += 1
        known = len(times.drafted) >= TRIAL
        if not self._first:
            times.drafted.append(seconds)
        if known:
            most = (1.0 if self._first else SLOW) * _middle(times.drafted)
            limit = SLOW * _middle(times.plain)
            plain = statistics.fmean(min(each, limit) for each in times.plain)
            self._add(statistics.fmean(emitted) - min(seconds, most) / plain)
        self._first = False

    def _add(self, passes: float) -> None:
        self.balance = min(max(self.balance + passes, LEAST), MOST)


def _middle(seconds: deque[float]) -> float:
    """The median; of an even number the lower one, so that one slow round of two does not count."""
    return max(statistics.median_low(seconds), 1e-9)
