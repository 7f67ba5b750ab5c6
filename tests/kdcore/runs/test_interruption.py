"""Signals that interrupt a process."""

from __future__ import annotations

import signal

import pytest

from tests.fixtures.processes.forked import python

SWALLOWED = """
import os, signal, time
from kdcore.runs import interruption

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.001)

interruption.stop_on_signals()
try:
    Deaf()
    for _ in range(3000):
        time.sleep(0.01)
except interruption.Terminated:
    print("stopped")
"""
HUNG_UP = """
import os, signal, sys
from kdcore.runs import interruption

signal.signal(signal.SIGHUP, int(sys.argv[1]))
interruption.stop_on_signals()
try:
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
except interruption.Terminated:
    print("stopped")
"""


def test_a_signal_that_a_destructor_swallows_comes_again() -> None:
    done = python("-c", SWALLOWED)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


@pytest.mark.parametrize(
    ("before", "said"), [(signal.SIG_DFL, "stopped\n"), (signal.SIG_IGN, "goes on\n")]
)
def test_a_closed_terminal_stops_what_was_not_started_to_outlive_it(before: int, said: str) -> None:
    assert python("-c", HUNG_UP, int(before)).stdout == said
