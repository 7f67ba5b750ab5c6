"""The examples of a stream without an end, in windows that any process can read again.

Each process and each worker of a loader reads the stream for itself, forwards. A run keeps where
each window begins, so a resumed run reads on from there, and finds a stream that has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from kdcore.data.source import DataSource, ExampleStream
from kdcore.errors import UserError
from kdcore.method.records import Row

FIRST = 256
"""Number of the first examples that stand for the others before training reads them."""
_HELD = 2
"""Number of windows in memory: a batch that is read ahead may be of the next one."""


def stream_of(source: DataSource) -> ExampleStream | None:
    """Open the stream of a source; None if the source has an end."""
    found: ExampleStream | None = getattr(source, "stream", lambda: None)()
    return found


class FirstExamples:
    """A source of the first examples of another source's stream.

    Args:
        source: The other source, which has a stream.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._examples: list[Any] | None = None

    def read(self) -> Sequence[Any]:
        """The first `FIRST` examples, fewer if the stream has fewer."""
        if self._examples is None:
            stream = stream_of(self._source)
            assert stream is not None  # as said above
            self._examples = [*islice(stream, FIRST)]
        return self._examples

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        """Encode an example as the source does."""
        return self._source.encode(example, tokenizer, max_length)


class WindowPlaces:
    """Where the windows of a run's stream begin, and the digests of their examples.

    Args:
        path: The file, with a line of JSON for each window; it need not exist.
        writes: Whether this process of the run adds to it.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path, self._writes = path, writes
        self._known: dict[int, tuple[Any, str]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):  # a killed process may leave a part of a line
                number, state, digest = json.loads(line)
                self._known[number] = state, digest

    def before(self, number: int) -> tuple[int, Any]:
        """The last known window up to one, and the state of the stream where it begins."""
        known = max((each for each in self._known if each <= number), default=0)
        return known, self._known[known][0] if known in self._known else None

    def settle(self, number: int, state: Any, examples: Sequence[Any]) -> None:
        """Record a window, or compare it with what was read before.

        Args:
            number: Number of the window.
            state: The state of the stream where it begins, as plain data.
            examples: The examples of the window.

        Raises:
            UserError: The run read other examples there.
        """
        digest = hashlib.sha256(repr(examples).encode()).hexdigest()
        if number in self._known:
            if self._known[number][1] != digest:
                raise UserError(
                    f"the stream of data.train changed since {self._path.parent} was written: "
                    f"{examples[0].id} is not what the run read there",
                    "restore the data, or start again with overwrite=True",
                )
            return
        self._known[number] = state, digest
        worker = get_worker_info()
        if self._writes and (worker is None or worker.id == 0):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, state, digest]) + "\n")


class Windows:
    """The examples of a stream by their places; the stream begins again at its end.

    Args:
        source: A source with a stream.
        size: Number of examples of a window.
        places: Where the windows begin.
    """

    def __init__(self, source: DataSource, size: int, places: WindowPlaces) -> None:
        self._source, self.size, self._places = source, size, places
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        self._close()
        return self.__dict__

    def __getitem__(self, place: int) -> Any:
        """The example at a place; it may have to read the stream up to there."""
        if self._process != os.getpid():  # a fork would share the open files of its parent
            self._close()
        number = place // self.size
        if number not in self._held:
            self._read_to(number)
        return self._held[number][place % self.size]

    def _close(self) -> None:
        self._process, self._next = os.getpid(), 0
        self._held: OrderedDict[int, list[Any]] = OrderedDict()
        self._stream: ExampleStream | None = None
        self._begin: Any = None
        self._rest: Iterator[Any] = iter(())

    def _read_to(self, number: int) -> None:
        """Read windows up to one, from where the stream is or from the last known place."""
        known, state = self._places.before(number)
        if self._stream is None:
            self._stream = stream_of(self._source)
            assert self._stream is not None  # as said above
            self._begin, self._next = self._stream.state_dict(), -1
        if not known <= self._next <= number:
            self._stream.load_state_dict(self._begin if state is None else state)
            self._rest, self._next = iter(self._stream), known
        while self._next <= number:
            state = self._stream.state_dict()
            try:
                examples = list(self._endless(self._stream))
                self._places.settle(self._next, state, examples)
            except UserError:
                self._close()  # the stream is somewhere within the window
                raise
            self._held[self._next] = examples
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
            self._next += 1

    def _endless(self, stream: ExampleStream) -> Iterator[Any]:
        """Yield the examples of a window."""
        left, fruitless = self.size, False
        while left:
            found = next(self._rest, None)
            if found is not None:
                left, fruitless = left - 1, False
                yield found
            elif fruitless:
                raise UserError(
                    "the stream of data.train has no rows",
                    "set path and split of data.train to data with at least one row",
                )
            else:
                stream.load_state_dict(self._begin)
                self._rest, fruitless = iter(stream), True
