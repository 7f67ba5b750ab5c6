"""Interruption of a command by Ctrl-C."""

from __future__ import annotations

AGAIN = "run the command again"


class InterruptedRun(Exception):
    """Interruption of a run, which the same command continues with ``--resume``."""


class Interrupted(Exception):
    """Interruption whose message says how to continue, where rerunning the command is not it."""
