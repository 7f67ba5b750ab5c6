"""The interface for showing progress; the command line implements it with rich."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """A stage of work with a known number of steps."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count ``steps`` more steps, and show ``figures`` (loss=...) beside the bar."""


class Progress(Protocol):
    """A display of stages and notes."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Stage]:
        """Start a stage of ``total`` steps, of which an earlier run did ``done``."""

    def note(self, line: str) -> None:
        """Show one line: a decision or a warning."""


class _NobodyWatches:
    def advance(self, steps: int = 1, **figures: float) -> None: ...


class Silent:
    """A display that shows nothing, for notebooks and tests."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """See `Progress.stage`."""
        yield _NobodyWatches()

    def note(self, line: str) -> None:
        """See `Progress.note`."""
