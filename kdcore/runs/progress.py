"""How long work tells whoever watches; the command line shows it with rich."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """``steps`` more are done; ``figures`` (loss=...) are shown beside the bar."""


class Progress(Protocol):
    """Whoever watches."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Stage]:
        """Begin a piece of work of ``total`` steps, ``done`` of them by an earlier run."""

    def note(self, line: str) -> None:
        """Say one line: a decision, a warning."""


class _NobodyWatches:
    def advance(self, steps: int = 1, **figures: float) -> None: ...


class Silent:
    """For notebooks and tests: shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """See `Progress.stage`."""
        yield _NobodyWatches()

    def note(self, line: str) -> None:
        """See `Progress.note`."""
