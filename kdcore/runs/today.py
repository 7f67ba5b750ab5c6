"""The date that chat templates print: today's, unless a run has pinned it.

A template may print the date of the day. The rows of a run would then change at midnight, and
neither a resumed run nor a teacher cache would find its rows again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime

_PINNED: ContextVar[datetime | None] = ContextVar("pinned", default=None)


def today() -> datetime:
    """The pinned date at midnight or, without one, the present time."""
    return _PINNED.get() or datetime.now()


@contextmanager
def pinned(day: str) -> Iterator[None]:
    """Pin the date for a block.

    Args:
        day: The date in ISO 8601; empty for a block that pins none.
    """
    token = _PINNED.set(_midnight(day) if day else _PINNED.get())
    try:
        yield
    finally:
        _PINNED.reset(token)


def pin(day: str) -> None:
    """Pin another date up to the end of the surrounding `pinned` block.

    Args:
        day: The date in ISO 8601.
    """
    _PINNED.set(_midnight(day))


def _midnight(day: str) -> datetime:
    return datetime.combine(date.fromisoformat(day), datetime.min.time())
