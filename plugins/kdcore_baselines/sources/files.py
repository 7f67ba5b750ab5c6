"""Data sources: conversations from a .jsonl file, labelled texts from a .csv file."""

from __future__ import annotations

import json
import operator
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeVar

from kdcore import BuildContext, Row
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError, unreadable
from kdcore.models.folder.files import file_digest, file_version
from kdcore_baselines.sources.components import (
    ChatParams,
    SeveralParams,
)
from kdcore_baselines.sources.conversations.recognition import fields_of
from kdcore_baselines.sources.conversations.rows import ConversationRows
from kdcore_baselines.sources.conversations.selection import (
    ConversationSource,
    LeftOut,
    conversations,
    in_memory,
    selection,
    selects,
)
from kdcore_baselines.sources.json_lines import WHERE, lines_of, row_of

Rows = TypeVar("Rows", bound=Sized)


CODE = 6
"""Version of the code that makes or leaves out examples, in the fingerprint of a source."""


class ChatSource(ConversationSource):
    """Source of conversations, one JSON object per line, whose fields determine its format."""

    def __init__(self, params: ChatParams, context: BuildContext) -> None:
        self.params = params
        self._known: tuple[tuple[int, ...], Sequence[Conversation]] | None = None

    @staticmethod
    def recognise(path: Path) -> dict[str, Any] | None:
        if path.suffix != ".jsonl":
            return None
        rows = (row_of(path, number, line)[1] for number, _, line in lines_of(path))
        return fields_of(rows, str(path))

    def read(self) -> Sequence[Conversation]:
        """Find the conversations of the file, again only after a change of the file."""
        if self.params.group is not None or not self.params.path.is_file():
            return self._read()  # a pipe says its rows once, and joined rows fill the memory
        version = file_version(self.params.path)
        if self._known is None or self._known[0] != version:
            self._known = version, self._read()
        return self._known[1]

    def _read(self) -> Sequence[Conversation]:
        params, path, places = self.params, self.params.path, array("q")
        lines = islice(lines_of(path), None if selects(params) else params.limit)
        self._left_out = left_out = LeftOut()

        def rows() -> Iterator[tuple[str, dict[str, Any]]]:
            for number, offset, line in lines:
                places.extend((number, offset, len(line)))
                yield row_of(path, number, line)

        if params.group is not None or not path.is_file():  # what a pipe says comes once
            return in_memory(rows(), params, "chat", str(path), left_out)
        # one pass finds all mistakes before any work
        found = conversations(rows(), params, "chat", str(path), left_out)
        numbers = selection(found, params, str(path), left_out)
        reader = ConversationRows(params, "chat")

        def read(wanted: range) -> list[Conversation]:
            with path.open("rb") as file:
                found = []
                for i in (numbers[each] for each in wanted):
                    number, offset, length = places[3 * i : 3 * i + 3]
                    file.seek(offset)
                    place, row = row_of(path, number, file.read(length))
                    found.append(reader.read(row, place))
            return found

        return Examples(len(numbers), read)

    def fingerprint(self) -> str | None:
        path = self.params.path
        if not path.is_file():
            return None
        said = self.params.model_dump(mode="json") | {"path": path.name}
        return json.dumps([CODE, said, digest_of(path)])


class SeveralSources:
    """Source that concatenates the rows of several sources.

    If an id occurs twice, the later row's id gets the number of its source as a suffix.
    """

    def __init__(self, params: SeveralParams, context: BuildContext) -> None:
        sources: list[Any] = [context.build(choice) for choice in params.sources]
        self.sources = sources
        self._known: tuple[list[Sequence[Any]], Sequence[Any]] | None = None
        kinds = {
            (
                getattr(type(source), "encode", type(source)),
                getattr(source, "model_class", None),
                getattr(source, "multi_label", False),
                tuple(getattr(source, "classes", ())),
                getattr(source, "augmentation", None),
                getattr(source, "compact", None),
            )
            for source in sources
        }
        if len(kinds) > 1:
            raise UserError(
                "source 'several' joins sources with different kinds of rows or different classes",
                "join conversations with conversations, and labelled texts with labelled texts of "
                "the same classes (classes_from)",
            )
        alike = ("model_class", "classes", "multi_label", "augmentation", "compact")
        for name in (*alike, "image_processor"):
            if hasattr(sources[0], name):
                setattr(self, name, getattr(sources[0], name))

    @property
    def left_out(self) -> Sequence[str]:
        """What the sources left out."""
        return [place for each in self.sources for place in getattr(each, "left_out", ())]

    def read(self) -> Sequence[Any]:
        parts = [source.read() for source in self.sources]
        if self._known and all(map(operator.is_, self._known[0], parts)):
            return self._known[1]
        starts = list(accumulate(map(len, parts), initial=0))
        found, renamed = set[str](), dict[int, str]()
        for number, example in enumerate(chain.from_iterable(parts)):
            name = example.id
            if name in found:
                name = renamed[number] = f"{name}#{bisect_right(starts, number)}"
            found.add(name)

        def read(places: range) -> list[Any]:
            return [one(place) for place in places]

        def one(place: int) -> Any:
            part = bisect_right(starts, place) - 1
            example = parts[part][place - starts[part]]
            return replace(example, id=renamed[place]) if place in renamed else example

        self._known = parts, Examples(starts[-1], read)
        return self._known[1]

    def fingerprint(self) -> str | None:
        told = [getattr(source, "fingerprint", lambda: None)() for source in self.sources]
        return None if None in told else json.dumps(told)

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        row: Row = self.sources[0].encode(example, tokenizer, max_length)
        return row


def digest_of(path: Path) -> str:
    """The sha256 of a file. Raises UserError when it cannot be read."""
    try:
        return file_digest(path)
    except OSError as fault:
        raise unreadable(path, fault, WHERE) from fault
