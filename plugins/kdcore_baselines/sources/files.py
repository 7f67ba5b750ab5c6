"""Data sources: conversations from a .jsonl file, labelled texts from a .csv file."""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdcore import BuildContext, Row
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError, nearest
from kdcore.models.folder.files import file_digest
from kdcore_baselines.sources.components import (
    ChatParams,
    LabelledTextParams,
    SeveralParams,
)
from kdcore_baselines.sources.conversation_rows import ConversationRows
from kdcore_baselines.sources.parts import stratified
from kdcore_baselines.sources.recognition import SAMPLE, fields_of
from kdcore_baselines.sources.selection import (
    ConversationSource,
    conversations,
    in_memory,
    selection,
    selects,
    some,
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


@dataclass(frozen=True, slots=True)
class LabelledText:
    """Text with its class.

    Attributes:
        id: Name of the row in messages.
        text: The text.
        labels: Indices of its classes.
    """

    id: str
    text: str
    labels: tuple[int, ...]


class LabelledSource:
    """Source of labelled texts, whose ``classes`` and ``multi_label`` the subclass sets."""

    model_class = "AutoModelForSequenceClassification"
    params: Any
    classes: Sequence[str]
    multi_label = False

    def read(self) -> list[LabelledText]:
        place_of = {label: place for place, label in enumerate(self.classes)}
        every, rows = list(self.rows()), []
        chosen = stratified([labels for _, _, labels in every], *self.params.part)
        for place, text, labels in (every[i] for i in chosen[: self.params.limit]):
            if unknown := next((label for label in labels if label not in place_of), None):
                raise UserError(
                    f"{place}: unknown label '{unknown}'; it does not occur in {self.origin}",
                    nearest(unknown, self.classes),
                )
            rows.append(LabelledText(place, text, tuple(place_of[label] for label in labels)))
        return some(rows, str(self.params.path))

    def encode(self, example: LabelledText, tokenizer: Any, max_length: int) -> Row:
        encoded = tokenizer(example.text, truncation=True, max_length=max_length)
        labels = torch.tensor(example.labels, dtype=torch.int64)
        if self.multi_label:
            labels = torch.zeros(len(self.classes), dtype=torch.int64).index_fill(0, labels, 1)
        return Row(
            inputs={name: torch.tensor(values) for name, values in encoded.items()},
            labels=labels,
            mask=torch.ones_like(labels, dtype=torch.bool),
            id=example.id,
        )

    @property
    def origin(self) -> str:
        """The name of the data that the classes come from."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield place, text and labels of each row."""
        raise NotImplementedError


class LabelledTextSource(LabelledSource):
    """Source of labelled texts, one per line; its ``classes`` are the labels, sorted."""

    def __init__(self, params: LabelledTextParams, context: BuildContext) -> None:
        self.params = params
        self._labels = params.classes_from or params.path
        self.multi_label = params.separator is not None
        self.classes = sorted(
            {each for _, _, labels in self._rows(self._labels) for each in labels}
        )

    @property
    def origin(self) -> str:
        return str(self._labels)

    def fingerprint(self) -> str:
        said = self.params.model_dump(mode="json") | {"path": self.params.path.name}
        said["classes_from"] = digest_of(self._labels)
        return json.dumps([CODE, said, digest_of(self.params.path)])

    def rows(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        return self._rows(self.params.path)

    def _rows(self, path: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield place, text and labels of each row of a file."""
        reader = csv.DictReader(io.StringIO(_text(path)))
        try:
            header = list(reader.fieldnames or ())
            _refuse_header(path, header, (self.params.text, self.params.label))
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                if None in row:
                    raise UserError(
                        f"{place} has more fields than the header, which has {len(header)}",
                        "put a text with commas in quotation marks",
                    )
                text, label = row[self.params.text], row[self.params.label]
                if self.params.separator is not None:
                    several = label.split(self.params.separator) if label else []
                    yield place, *labelled_by_several(text, several, place)
                else:
                    yield place, *labelled(text, label, place)
        except csv.Error as fault:
            raise UserError(
                f"{path.name}:{reader.line_num}: {fault}",
                "look for an unclosed quotation mark",
            ) from fault


def _refuse_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """Raises UserError when a column is missing, or occurs twice."""
    for column in columns:
        if column not in header:
            raise UserError(f"{path} has no column '{column}'", nearest(column, header))
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UserError(
            f"{path.name}:1: the column '{twice}' occurs twice", "rename or remove one of them"
        )


def labelled_by_several(text: Any, labels: Any, place: str) -> tuple[str, tuple[str, ...]]:
    """Check the text and the labels of a row, which may have none.

    Args:
        text: The text.
        labels: The labels.
        place: Name of the row in messages.

    Returns:
        Both, each label once.

    Raises:
        UserError: As for `labelled`, or the labels are not a list.
    """
    if not isinstance(labels, list):
        raise UserError(f"{place}: the labels must be a list", "write [] for a row without labels")
    checked = [label for each in labels or ["-"] for label in labelled(text, each, place)[1]]
    return text, tuple(dict.fromkeys(checked)) if labels else ()


def labelled(text: Any, label: Any, place: str) -> tuple[str, tuple[str]]:
    """Check the text and the label of a row.

    Args:
        text: The text.
        label: The label.
        place: Name of the row in messages.

    Returns:
        The text, and a tuple of the label.

    Raises:
        UserError: One is missing or is not text, or blanks surround the label.
    """
    if not text or not label:
        raise UserError(f"{place} has no text or no label", "fix or remove the line")
    if not isinstance(text, str) or not isinstance(label, str):
        raise UserError(f"{place}: text and label must be strings", "name other columns")
    if label != label.strip():
        raise UserError(
            f"{place}: the label '{label}' begins or ends with a blank, which would make it "
            "another class",
            "remove the blanks around it",
        )
    return text, (label,)


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
            )
            for source in sources
        }
        if len(kinds) > 1:
            raise UserError(
                "source 'several' joins sources with different kinds of rows or different classes",
                "join conversations with conversations, and labelled texts with labelled texts of "
                "the same classes (classes_from)",
            )
        for name in ("model_class", "classes", "multi_label"):
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
        raise _unreadable(path, fault) from fault


def _row(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    """The place and the object of a line."""
    place = f"{path.name}:{number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as fault:
        raise _not_utf8(path, fault) from fault
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
        raise _unreadable(path, fault) from fault


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise _unreadable(path, fault) from fault
    except UnicodeDecodeError as fault:
        raise _not_utf8(path, fault) from fault


def _unreadable(path: Path, fault: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read: {fault.strerror}",
        "check the path, which is relative to the spec's folder (for an option, to the working "
        "directory)",
    )


def _not_utf8(path: Path, fault: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} is not UTF-8: {fault.reason}", "save it as UTF-8")
