"""Decoding by a clock that only the stubs advance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.decoding.loop import Decoder
from kdcore_baselines.verifiers import Greedy
from tests.tiny.drafters import Levels

PLAIN = 4.25
"""Seconds of a plain pass."""


class Clock:
    """Seconds that pass only when they are spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedEngine(TorchEngine):
    """A pass takes 4 s and 0.25 s for each row."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def run(self, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        self.clock.now += 4.0 + 0.25 * tokens.shape[1]
        return super().run(tokens, *rest)


class TimedLevels(Levels):
    """A proposal takes 2 s, and one that reads a prompt a minute."""

    clock: Clock
    takes = 2.0

    def start(self, first: Tensor) -> None:
        super().start(first)
        self.reads = True

    def propose(self, tokens: Tensor, *rest: Any) -> Any:
        self.clock.now += 60.0 if self.reads else self.takes
        self.reads = False
        return super().propose(tokens, *rest)


def timed_decoder(target: Any, drafter: Any, clock: Clock) -> Decoder:
    engine = TimedEngine(clock)
    engine.bind(target, ())
    return Decoder(target, drafter, Greedy(None, None), engine=engine)
