"""A source whose examples become rows of the student and, in another form, of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.source import DataSource


class SecondReading:
    """A source whose examples a teacher reads in another form; subclasses encode both.

    Args:
        source: The source.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source

    def read(self) -> Sequence[Any]:
        """The examples of the source."""
        return self._source.read()

    @property
    def left_out(self) -> Sequence[str]:
        """The places of the examples that the last `read` left out."""
        found: Sequence[str] = getattr(self._source, "left_out", ())
        return found
