"""The training rows of a stream without an end, encoded when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from kdcore.data.encoded.stream_windows import WindowPlaces, Windows
from kdcore.data.source import DataSource
from kdcore.errors import in_field
from kdcore.method.records import Row


class StreamedRows(Sequence[Row]):
    """The rows of a training, whose places are those of their examples in the stream.

    A row may lack a learned token: without its encoding nobody knows, and the places of the rows
    must not depend on it.

    Args:
        source: A source with a stream.
        tokenizer: The tokenizer.
        max_length: Maximum number of positions of a row.
        count: Number of rows that the training reads.
        window: Number of successive rows that are shuffled together.
        first: The first rows with a learned token, which stand for the others.
        folder: The folder in which the run keeps where the windows begin.
        writes: Whether this process of the run writes there.

    Attributes:
        first: As above.
        window: As above.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: Any,
        max_length: int,
        *,
        count: int,
        window: int,
        first: Sequence[Row],
        folder: Path,
        writes: bool,
    ) -> None:
        self.first, self.window = first, window
        self._source, self._tokenizer, self._max_length = source, tokenizer, max_length
        self._places = range(count)
        self._windows = Windows(
            source, window, WindowPlaces(folder / "windows.jsonl", writes=writes)
        )

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[each] for each in self._places[place]]
        with in_field("data.train"):
            example = self._windows[self._places[place]]
            return self._source.encode(example, self._tokenizer, self._max_length)
