"""Examples that are read when they are asked for, so that millions of them need no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

Example = TypeVar("Example")


class Examples(Sequence[Example]):
    """A sequence whose items are read each time.

    Args:
        count: Number of examples.
        read: Function of a range of places, which reads the examples there.
        at_once: Number of examples that an iteration reads at a time.
    """

    def __init__(
        self, count: int, read: Callable[[range], list[Example]], at_once: int = 1000
    ) -> None:
        self._places, self._read, self._at_once = range(count), read, at_once

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return self._read(self._places[place])
        at = self._places[place]
        return self._read(range(at, at + 1))[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), self._at_once):
            yield from self[start : start + self._at_once]
