"""Data sources: conversations from a .jsonl file, labelled texts from a .csv file."""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeVar

from kdcore import BuildContext, Row
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError
from kdcore.models.folder.files import file_digest
from kdcore_baselines.sources.components import (
    ChatParams,
    SeveralParams,
)
from kdcore_baselines.sources.conversation_rows import ConversationRows
from kdcore_baselines.sources.recognition import SAMPLE, fields_of
from kdcore_baselines.sources.selection import (
    ConversationSource,
    conversations,
    in_memory,
    selection,
    selects,
)

Rows = TypeVar("Rows", bound=Sized)


LONGEST = 2**26
"""Bytes of a line of a JSONL file; a file without line ends would fill the memory."""
CODE = 2
"""Version of the code that makes examples of rows; it is part of the fingerprint of a source."""


class ChatSource(ConversationSource):
    """Source of conversations, one JSON object per line, whose fields determine its format."""

    def __init__(self, params: ChatParams, context: BuildContext) -> None:
        self.params = params

    @staticmethod
    def recognise(path: Path) -> dict[str, Any] | None:
        if path.suffix != ".jsonl":
            return None
        rows = (_row(path, number, line)[1] for number, _, line in islice(_lines(path), SAMPLE))
        return fields_of(list(rows), str(path))

    def read(self) -> Sequence[Conversation]:
        params, path, places = self.params, self.params.path, array("q")
        lines = islice(_lines(path), None if selects(params) else params.limit)
        self.left_out = left_out = list[str]()

        def rows() -> Iterator[tuple[str, dict[str, Any]]]:
            for number, offset, line in lines:
                places.extend((number, offset, len(line)))
                yield _row(path, number, line)

        if params.group is not None or not path.is_file():  # what a pipe says comes once
            return in_memory(rows(), params, "chat", str(path), left_out)
        # one pass finds all mistakes before any work
        found = conversations(rows(), params, "chat", str(path), left_out)
        numbers = selection(found, params, str(path))
        reader = ConversationRows(params, "chat")

        def read(wanted: range) -> list[Conversation]:
            with path.open("rb") as file:
                found = []
                for i in (numbers[each] for each in wanted):
                    number, offset, length = places[3 * i : 3 * i + 3]
                    file.seek(offset)
                    place, row = _row(path, number, file.read(length))
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
        kinds = {
            (
                getattr(type(source), "encode", type(source)),
                getattr(source, "model_class", None),
                getattr(source, "multi_label", False),
                tuple(getattr(source, "classes", ())),
                getattr(source, "augmentation", None),
            )
            for source in sources
        }
        if len(kinds) > 1:
            raise UserError(
                "source 'several' joins sources with different kinds of rows or different classes",
                "join conversations with conversations, and labelled texts with labelled texts of "
                "the same classes (classes_from)",
            )
        for name in ("model_class", "classes", "multi_label", "augmentation"):
            if hasattr(sources[0], name):
                setattr(self, name, getattr(sources[0], name))

    @property
    def left_out(self) -> Sequence[str]:
        """What the sources left out."""
        return [place for each in self.sources for place in getattr(each, "left_out", ())]

    def read(self) -> Sequence[Any]:
        parts = [source.read() for source in self.sources]
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

        return Examples(starts[-1], read)

    def fingerprint(self) -> str | None:
        told = [getattr(source, "fingerprint", lambda: None)() for source in self.sources]
        return None if None in told else json.dumps(told)

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        row: Row = self.sources[0].encode(example, tokenizer, max_length)
        return row


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line that is not blank."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), start=1):
                if len(line) == LONGEST:
                    raise UserError(
                        f"{path.name}:{number} is longer than {LONGEST >> 20} MiB",
                        "write one JSON object per line",
                    )
                if line.removeprefix(BOM_UTF8).strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as fault:
        raise unreadable(path, fault) from fault


def _row(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    """The place and the object of a line."""
    place = f"{path.name}:{number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as fault:
        raise not_utf8(path, fault) from fault
    except json.JSONDecodeError as fault:
        raise UserError(
            f"{place} is not valid JSON: {fault.msg} at column {fault.colno}",
            "write one JSON object per line",
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise UserError(
            f"{place} has a number with thousands of digits, or thousands of nested brackets",
            "write one JSON object per line",
        ) from fault
    if not isinstance(row, dict):
        raise UserError(
            f"{place} must be a JSON object, not a {type(row).__name__}",
            "write one JSON object per line",
        )
    if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{place} contains an incomplete surrogate pair", "fix its \\uD... escapes")
    return place, row


def digest_of(path: Path) -> str:
    """The sha256 of a file. Raises UserError when it cannot be read."""
    try:
        return file_digest(path)
    except OSError as fault:
        raise unreadable(path, fault) from fault


def unreadable(path: Path, fault: OSError) -> UserError:
    """The error of a file that cannot be read."""
    return UserError(
        f"{path} cannot be read: {fault.strerror}",
        "check the path, which is relative to the spec's folder (for an option, to the working "
        "directory)",
    )


def not_utf8(path: Path, fault: UnicodeDecodeError) -> UserError:
    """The error of a file that is not text."""
    return UserError(f"{path} is not UTF-8: {fault.reason}", "save it as UTF-8")
