"""Data sources of labelled texts: what all share, and those of .csv files."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdcore import BuildContext, Row
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError, nearest, not_utf8, unreadable
from kdcore_baselines.sources.components import LabelledTextParams
from kdcore_baselines.sources.conversations.selection import some
from kdcore_baselines.sources.csv_format import delimiter_of, header_of
from kdcore_baselines.sources.files import CODE, digest_of
from kdcore_baselines.sources.json_lines import WHERE
from kdcore_baselines.sources.parts import stratified

UNLABELLED = -1
"""The label of rows whose label is hidden, as in test splits, or on which annotators disagree."""


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
    """Source of labelled texts, whose ``classes`` and ``multi_label`` the subclass sets.

    A text is read from the data when it is asked for, so that millions of them need no memory.

    Attributes:
        left_out: The places of the rows of the part that the last `read` left out without a label.
    """

    model_class = "AutoModelForSequenceClassification"
    params: Any
    classes: Sequence[str]
    multi_label = False
    left_out: Sequence[str] = ()

    def read(self) -> Examples[Any]:
        numbers: dict[tuple[str, ...] | None, int] = {None: -1}
        of_row = array("q", (numbers.setdefault(each, len(numbers) - 1) for each in self.labels()))
        sets = [each for each in numbers if each is not None]
        if of_row and not sets:
            raise UserError(
                f"none of the {len(of_row):,} rows of {self.params.path} has a label",
                "choose a split with labels",
            )
        part = stratified(of_row, *self.params.part)
        self.left_out = [self.place(row) for row in part if of_row[row] < 0]
        chosen = array("q", [row for row in part if of_row[row] >= 0][: self.params.limit])
        known = frozenset(self.classes)
        for row in chosen:
            if not known.issuperset(sets[of_row[row]]):
                ((place, _),) = self.contents([row])
                self.numbers(sets[of_row[row]], place)
        place_of = self._place_of
        classes_of = [tuple(place_of.get(each, -1) for each in labels) for labels in sets]

        def read(places: range) -> list[Any]:
            rows = [chosen[place] for place in places]
            return [
                self.example(place, content, classes_of[of_row[row]])
                for row, (place, content) in zip(rows, self.contents(rows), strict=True)
            ]

        return Examples(len(some(chosen, str(self.params.path))), read)

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {label: place for place, label in enumerate(self.classes)}

    def numbers(self, labels: Sequence[str], place: str) -> tuple[int, ...]:
        """The indices of a row's classes. Raises UserError for a label that is not a class."""
        if unknown := next((each for each in labels if each not in self._place_of), None):
            raise UserError(
                f"{place}: unknown label '{unknown}'; it does not occur in {self.origin}",
                nearest(unknown, self.classes),
            )
        return tuple(self._place_of[each] for each in labels)

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        encoded = tokenizer(example.text, truncation=True, max_length=max_length)
        inputs = {name: torch.tensor(values) for name, values in encoded.items()}
        return self.row(example, inputs)

    def row(self, example: Any, inputs: dict[str, torch.Tensor]) -> Row:
        """The row of an example, whose inputs are encoded."""
        labels = torch.tensor(example.labels, dtype=torch.int64)
        if self.multi_label:
            labels = torch.zeros(len(self.classes), dtype=torch.int64).index_fill(0, labels, 1)
        return Row(inputs, labels, torch.ones_like(labels, dtype=torch.bool), example.id)

    @property
    def origin(self) -> str:
        """The name of the data that the classes come from."""
        raise NotImplementedError

    def labels(self) -> Iterator[tuple[str, ...] | None]:
        """Yield the labels of each row, all of which are checked; None for a row to leave out."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """The name of a row, by its number from 0, in messages."""
        raise NotImplementedError

    def contents(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield place and content of the rows with these numbers, from 0."""
        raise NotImplementedError

    def example(self, place: str, content: Any, labels: tuple[int, ...]) -> Any:
        """An example of what `contents` yields."""
        return LabelledText(place, content, labels)


class LabelledTextSource(LabelledSource):
    """Source of labelled texts, one per line; its ``classes`` are the labels, sorted."""

    def __init__(self, params: LabelledTextParams, context: BuildContext) -> None:
        self.params = params
        self._labels = params.classes_from or params.path
        self.multi_label = params.separator is not None
        first: dict[str, int] = {}
        for record, labels in self._rows(self._labels):
            for each in labels:
                first.setdefault(each, record.line)
        if str(UNLABELLED) in first and are_integers(first):
            raise refused_minus_one(f"{self._labels.name}:{first[str(UNLABELLED)]}")
        self.classes = sorted(first)
        self._places = array("q")

    @property
    def origin(self) -> str:
        return str(self._labels)

    def fingerprint(self) -> str:
        said = self.params.model_dump(mode="json") | {"path": self.params.path.name}
        said["classes_from"] = digest_of(self._labels)
        return json.dumps([CODE, said, digest_of(self.params.path)])

    def labels(self) -> Iterator[tuple[str, ...]]:
        self._places = array("q")
        for record, labels in self._rows(self.params.path):
            self._places.extend((record.start, record.end, record.line))
            yield labels

    def place(self, row: int) -> str:
        return f"{self.params.path.name}:{self._places[3 * row + 2]}"

    def contents(self, rows: Sequence[int]) -> Iterator[tuple[str, str]]:
        path = self.params.path
        column = next(_records(path)).fields.index(self.params.text)
        delimiter = _delimiter(path)
        with path.open("rb") as file:
            for row in rows:
                start, end, _ = self._places[3 * row : 3 * row + 3]
                file.seek(start)
                text = _lines_alike(file.read(end - start).decode("utf-8"))
                records = csv.reader(io.StringIO(text), delimiter=delimiter)
                yield self.place(row), next(each for each in records if each)[column]

    def _rows(self, path: Path) -> Iterator[tuple[_Record, tuple[str, ...]]]:
        """Yield record and labels of each row of a file, which is checked."""
        records = _records(path)
        header = next(records, _NOTHING).fields
        _refuse_header(path, header, (self.params.text, self.params.label))
        at = [header.index(name) for name in (self.params.text, self.params.label)]
        for record in records:
            place = f"{path.name}:{record.line}"
            if len(record.fields) > len(header):
                raise UserError(
                    f"{place} has more fields than the header, which has {len(header)}",
                    "put a text with commas in quotation marks",
                )
            lacking = [""] * (len(header) - len(record.fields))
            text, label = ([*record.fields, *lacking][each] for each in at)
            refuse_no_text(text, place)
            if self.params.separator is not None:
                yield record, labels_of(label.split(self.params.separator) if label else [], place)
            else:
                yield record, label_of(label, place)


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of a .csv file: where its bytes are, its last line, and its fields."""

    start: int
    end: int
    line: int
    fields: list[str]


_NOTHING = _Record(0, 0, 0, [])


def _records(path: Path) -> Iterator[_Record]:
    """Yield the records of a .csv file, without blank ones. Raises UserError for a damaged file."""
    start = end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            end += len(line.encode("utf-8"))
            yield _lines_alike(line)

    try:
        with path.open(encoding="utf-8", newline="") as file:
            if file.read(1) == "\ufeff":
                start = end = 3
            else:
                file.seek(0)
            reader = csv.reader(lines(), delimiter=_delimiter(path))
            for fields in reader:
                if fields:
                    yield _Record(start, end, reader.line_num, fields)
                start = end
    except OSError as fault:
        raise unreadable(path, fault, WHERE) from fault
    except UnicodeDecodeError as fault:
        raise not_utf8(path, fault) from fault
    except csv.Error as fault:
        raise UserError(
            f"{path.name}:{reader.line_num}: {fault}",
            "look for an unclosed quotation mark",
        ) from fault


def _delimiter(path: Path) -> str:
    return delimiter_of(header_of(path, "utf-8-sig"))


def _lines_alike(text: str) -> str:
    """A text whose lines end as on Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def refuse_no_text(text: Any, place: str) -> None:
    """Check the text of a row.

    Args:
        text: The text.
        place: Name of the row in messages.

    Raises:
        UserError: It is missing, or is not text.
    """
    if not text:
        raise UserError(f"{place} has no text", "add the text, or remove the row")
    if not isinstance(text, str):
        raise UserError(f"{place}: the text must be a string", "name another column (text)")


def are_integers(labels: Iterable[str]) -> bool:
    """Whether the texts of all labels are integers."""
    return all(label.removeprefix("-").isdecimal() for label in labels)


def refused_minus_one(place: str) -> UserError:
    """The error of a label -1 among other integers: it may be a class, or stand for none.

    Args:
        place: Name of the row in messages.

    Returns:
        The error.
    """
    return UserError(
        f"{place} has the label {UNLABELLED}, which stands for no label in many data sets",
        "choose data with labels, or remove such rows; if it is a class of yours, write the labels "
        "as text, e.g. 'negative'",
    )


def labels_of(labels: Any, place: str) -> tuple[str, ...]:
    """Check the labels of a row, which may have none.

    Args:
        labels: The labels.
        place: Name of the row in messages.

    Returns:
        Each label once.

    Raises:
        UserError: As for `label_of`, or the labels are not a list.
    """
    if not isinstance(labels, list):
        raise UserError(f"{place}: the labels must be a list", "write [] for a row without labels")
    return tuple(dict.fromkeys(each for label in labels for each in label_of(label, place)))


def label_of(label: Any, place: str) -> tuple[str]:
    """Check the label of a row.

    Args:
        label: The label.
        place: Name of the row in messages.

    Returns:
        A tuple of the label.

    Raises:
        UserError: It is missing or is not text, or blanks surround it.
    """
    if label is None or label == "":
        raise UserError(f"{place} has no label", "add the label, or remove the row")
    if not isinstance(label, str):
        raise UserError(
            f"{place}: the label must be a string or an integer, not {label!r:.40}",
            "name another column (label), or convert this one",
        )
    if label != label.strip():
        raise UserError(
            f"{place}: the label '{label}' begins or ends with a blank, which would make it "
            "another class",
            "remove the blanks around it",
        )
    return (label,)
