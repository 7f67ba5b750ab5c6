"""Data sources that read through Hugging Face datasets: hub ids, tables and saved data sets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kdcore import BuildContext
from kdcore.components.optional_packages import import_early
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError, nearest
from kdcore_baselines.sources.components import (
    DatasetParams,
    ImageDatasetParams,
    LabelledDatasetParams,
    LoadedParams,
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
from kdcore_baselines.sources.csv_format import guessed_encoding
from kdcore_baselines.sources.files import CODE
from kdcore_baselines.sources.hub.loading import (
    READERS,
    load,
    name_of,
    origin_of,
    placed,
    refused_data,
    suffix_of,
    without_nulls,
)
from kdcore_baselines.sources.hub.streams import SplitStream
from kdcore_baselines.sources.labelled import (
    UNLABELLED,
    LabelledSource,
    are_integers,
    label_of,
    labels_of,
    refuse_no_text,
    refused_minus_one,
)

datasets: Any = import_early("datasets")

FIRST = 32
"""Number of the first rows of a stream, which tell its columns."""


class DatasetSource(ConversationSource):
    """Source of conversations, whose columns determine their format as in the chat source."""

    def __init__(self, params: DatasetParams, context: BuildContext) -> None:
        self.params = params

    @staticmethod
    def recognise(path: Path) -> dict[str, Any] | None:
        if path.is_file() and suffix_of(path) not in READERS:
            return None
        params, written = DatasetParams.model_validate({"path": str(path.resolve())}), {}
        if path.is_file() and READERS[suffix_of(path)] == "csv":
            try:
                encoding = guessed_encoding(path)
            except (OSError, EOFError, zlib.error) as fault:
                raise refused_data(params, fault) from fault
            written = {"encoding": encoding} if encoding else {}
            params = params.model_copy(update=written)
        rows = (without_nulls(row) for _, row in placed(load(params), params))
        return written | fields_of(rows, str(path))

    def stream(self) -> SplitStream | None:
        if not self.params.endless:
            return None
        reader = ConversationRows(self.params, "dataset")
        return SplitStream(self.params, lambda row, place: reader.read(without_nulls(row), place))

    def read(self) -> Sequence[Conversation]:
        params, origin = self.params, origin_of(self.params)
        refuse_endless(params)
        data = load(params)
        self._left_out = left_out = LeftOut()
        rows = islice(placed(data, params), None if selects(params) else params.limit)
        cleaned = ((place, without_nulls(row)) for place, row in rows)
        if params.streaming or params.group is not None:  # rows of a stream come once
            return in_memory(cleaned, params, "dataset", origin, left_out)
        # one pass finds all mistakes
        found = conversations(cleaned, params, "dataset", origin, left_out)
        numbers = selection(found, params, origin, left_out)
        reader, name = ConversationRows(params, "dataset"), name_of(params)

        def read(places: range) -> list[Conversation]:
            wanted = [numbers[place] for place in places]
            several = zip(wanted, data.select(wanted), strict=True)
            return [reader.read(without_nulls(row), f"{name}:{i + 1}") for i, row in several]

        return Examples(len(numbers), read)

    def fingerprint(self) -> str | None:
        return fingerprint(self.params, None if self.params.streaming else load(self.params))


class LabelledDatasetSource(LabelledSource):
    """Source of labelled texts; its ``classes`` are the names that the column declares.

    A column without names has the labels of a split as its classes, sorted.
    """

    content = "text"
    """The parameter that names the column of what is classified."""

    def __init__(
        self, params: LabelledDatasetParams | ImageDatasetParams, context: BuildContext
    ) -> None:
        self.params = params
        self._data = self._loaded(params)
        for column in (getattr(params, self.content), params.label):
            if column not in _columns(self._data):
                known = _columns(self._data)
                raise UserError(
                    f"{origin_of(params)} has no column '{column}'; its columns are "
                    f"{', '.join(known)}",
                    nearest(column, known),
                )
        kind: Any = self._data.features[params.label]
        self.multi_label = isinstance(kind, datasets.List)
        kind = kind.feature if self.multi_label else kind
        self._names: list[str] | None = getattr(kind, "names", None)
        if params.endless and self._names is None and params.classes_split is None:
            raise UserError(
                f"{origin_of(params)} is a stream without an end, and its column '{params.label}' "
                "does not have class names",
                "set classes_split to a split with all labels, e.g. classes_split: test, or set "
                "limit",
            )
        self.classes = self._names or _sorted(
            {each for labels in self._labels(self._of_classes()) for each in labels or ()}
        )

    @property
    def origin(self) -> str:
        split = self.params.classes_split or self.params.split
        return f"split {split} of {self.params.path}"

    def fingerprint(self) -> str | None:
        if self.params.streaming:
            return None
        return fingerprint(self.params, self._data, self._of_classes())

    def read(self) -> Examples[Any]:
        refuse_endless(self.params)
        return super().read()

    def stream(self) -> SplitStream | None:
        if not self.params.endless:
            return None
        return SplitStream(self.params, self._streamed, self._encoded)

    def _streamed(self, row: dict[str, Any], place: str) -> Any:
        """The example of a row of a stream."""
        self._check(row, place)
        labels = self.numbers(self._labels_of(row, place), place)
        return self.example_of(place, row[getattr(self.params, self.content)], labels)

    def example_of(self, place: str, content: Any, labels: tuple[int, ...]) -> Any:
        """An example of a row of a stream, of its content and the indices of its classes."""
        return self.example(place, content, labels)

    def labels(self) -> Iterator[tuple[str, ...] | None]:
        return self._labels(self._data)

    def contents(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        for row, found in zip(rows, self._data.select(rows), strict=True):
            yield self.place(row), found[self.params.text]

    def place(self, row: int) -> str:
        """The name of a row in messages."""
        return f"{name_of(self.params)}:{row + 1}"

    def _check(self, row: dict[str, Any], place: str) -> None:
        """Raises UserError for a row without a text."""
        refuse_no_text(row[self.params.text], place)

    def _checked_columns(self, data: Any) -> Any:
        """The columns that are read when all rows are checked."""
        return data

    def _loaded(self, params: LabelledDatasetParams | ImageDatasetParams) -> Any:
        """The split; of a stream the first rows, in memory."""
        data = load(params)
        if params.streaming:
            data = self._encoded(data)
            rows = [row for _, row in placed(data.take(params.limit or FIRST), params)]
            data = datasets.Dataset.from_list(rows, features=data.features)
        return data

    def _encoded(self, data: Any) -> Any:
        """A stream whose contents are as small as they can be held in memory."""
        return data

    def _of_classes(self) -> Any:
        split = self.params.classes_split
        if split is None:
            return self._data
        params = self.params.model_copy(update={"split": split})
        return load(params) if params.endless else self._loaded(params)

    def _labels(self, data: Any) -> Iterator[tuple[str, ...] | None]:
        """Yield the labels of each row, which is checked; None for -1 beside named classes."""
        named = self._names is not None and not self.multi_label
        for place, row in placed(self._checked_columns(data), self.params):
            self._check(row, place)
            none = named and row[self.params.label] == UNLABELLED
            yield None if none else self._labels_of(row, place)

    def _labels_of(self, row: dict[str, Any], place: str) -> tuple[str, ...]:
        """The labels of a row."""
        label = row[self.params.label]
        if self.multi_label:
            return labels_of([self._named(each, place) for each in label or []], place)
        return label_of(self._named(label, place), place)

    def _named(self, label: Any, place: str) -> Any:
        """The name of a label."""
        if self._names is not None and label is not None:
            if not 0 <= label < len(self._names):
                left_out = label == UNLABELLED and self.params.endless
                raise UserError(
                    f"{place} has the label {label}, which does not name a class",
                    "choose a split with labels"
                    + (", or remove streaming, so that such rows are left out" if left_out else ""),
                )
            return self._names[label]
        if label == UNLABELLED and isinstance(label, int):
            raise refused_minus_one(place)
        return str(label) if isinstance(label, int) else label


def refuse_endless(params: LoadedParams) -> None:
    """Raises UserError for a stream that only a training can read."""
    if params.endless:
        raise UserError(
            f"{origin_of(params)} is a stream without an end, which only data.train of a training "
            "may be",
            "set limit in the source",
        )


def fingerprint(params: LoadedParams, *data: Any) -> str | None:
    """The fingerprint of a source of loaded data; None for a stream, which does not tell its own.

    Args:
        params: The params of the source.
        data: The data that it loads.

    Returns:
        The fingerprint.
    """
    told = [getattr(each, "_fingerprint", None) for each in data]
    if params.streaming or None in told:
        return None
    return json.dumps([CODE, datasets.__version__, params.model_dump(mode="json"), told])


def _sorted(labels: Iterable[str]) -> list[str]:
    """Labels in order; those of whole numbers by their size."""
    found = list(labels)
    if are_integers(found):
        return sorted(found, key=int)
    return sorted(found)


def _columns(data: Any) -> list[str]:
    return list(data.features or {})
