"""Data sources that read through Hugging Face datasets: hub ids, tables and saved data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kdcore import BuildContext
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.examples import Examples
from kdcore.errors import UserError, nearest
from kdcore_baselines.sources.components import (
    DatasetParams,
    ImageDatasetParams,
    LabelledDatasetParams,
    LoadedParams,
)
from kdcore_baselines.sources.conversation_rows import ConversationRows
from kdcore_baselines.sources.csv_format import delimiter_of, guessed_encoding, header_of
from kdcore_baselines.sources.files import CODE
from kdcore_baselines.sources.labelled import (
    LabelledSource,
    label_of,
    labels_of,
    refuse_no_text,
)
from kdcore_baselines.sources.recognition import SAMPLE, fields_of
from kdcore_baselines.sources.selection import (
    ConversationSource,
    conversations,
    in_memory,
    selection,
    selects,
)

try:  # at import time, since a comparison imports its components' modules once
    import datasets
except ImportError:
    datasets = None

READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Reader of datasets by the suffix of a file, before .gz if it is compressed."""


class DatasetSource(ConversationSource):
    """Source of conversations, whose columns determine their format as in the chat source."""

    def __init__(self, params: DatasetParams, context: BuildContext) -> None:
        self.params = params

    @staticmethod
    def recognise(path: Path) -> dict[str, Any] | None:
        if path.is_file() and _suffix(path) not in READERS:
            return None
        written = {}
        if path.is_file() and READERS[_suffix(path)] == "csv" and (other := guessed_encoding(path)):
            written = {"encoding": other}
        params = DatasetParams.model_validate({"path": str(path.resolve()), **written})
        rows = islice(placed(_load(params), params), SAMPLE)
        return written | fields_of([_without_nulls(row) for _, row in rows], str(path))

    def read(self) -> Sequence[Conversation]:
        params, data, origin = self.params, _load(self.params), _origin(self.params)
        self.left_out = left_out = list[str]()
        rows = islice(placed(data, params), None if selects(params) else params.limit)
        cleaned = ((place, _without_nulls(row)) for place, row in rows)
        if params.streaming or params.group is not None:  # rows of a stream come once
            return in_memory(cleaned, params, "dataset", origin, left_out)
        # one pass finds all mistakes
        found = conversations(cleaned, params, "dataset", origin, left_out)
        numbers = selection(found, params, origin)
        reader, name = ConversationRows(params, "dataset"), _name(params)

        def read(places: range) -> list[Conversation]:
            wanted = [numbers[place] for place in places]
            several = zip(wanted, data.select(wanted), strict=True)
            return [reader.read(_without_nulls(row), f"{name}:{i + 1}") for i, row in several]

        return Examples(len(numbers), read)

    def fingerprint(self) -> str | None:
        return fingerprint(self.params, None if self.params.streaming else _load(self.params))


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
                    f"{_origin(params)} has no column '{column}'; its columns are "
                    f"{', '.join(known)}",
                    nearest(column, known),
                )
        kind: Any = self._data.features[params.label]
        self.multi_label = isinstance(kind, datasets.List)
        kind = kind.feature if self.multi_label else kind
        self._names: list[str] | None = getattr(kind, "names", None)
        self.classes = self._names or _sorted(
            {each for labels in self._labels(self._of_classes()) for each in labels}
        )

    @property
    def origin(self) -> str:
        split = self.params.classes_split or self.params.split
        return f"split {split} of {self.params.path}"

    def fingerprint(self) -> str | None:
        return fingerprint(self.params, self._data, self._of_classes())

    def labels(self) -> Iterator[tuple[str, ...]]:
        return self._labels(self._data)

    def contents(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        for row, found in zip(rows, self._data.select(rows), strict=True):
            yield self.place(row), found[self.params.text]

    def place(self, row: int) -> str:
        """The name of a row in messages."""
        return f"{_name(self.params)}:{row + 1}"

    def _checked(self, data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield place and fields of each row. Raises UserError for one without a text."""
        for place, row in placed(data, self.params):
            refuse_no_text(row[self.params.text], place)
            yield place, row

    def _loaded(self, params: LabelledDatasetParams | ImageDatasetParams) -> Any:
        """The split; of a stream the first rows, in memory."""
        data = _load(params)
        if params.streaming:
            rows = [row for _, row in placed(data.take(params.limit), params)]
            data = datasets.Dataset.from_list(rows, features=data.features)
        return data

    def _of_classes(self) -> Any:
        split = self.params.classes_split
        if split is None:
            return self._data
        return self._loaded(self.params.model_copy(update={"split": split}))

    def _labels(self, data: Any) -> Iterator[tuple[str, ...]]:
        """Yield the labels of each row, which is checked."""
        for place, row in self._checked(data):
            label = row[self.params.label]
            if self.multi_label:
                yield labels_of([self._named(each, place) for each in label or []], place)
            else:
                yield label_of(self._named(label, place), place)

    def _named(self, label: Any, place: str) -> Any:
        """The name of a label."""
        if self._names is not None and label is not None:
            if not 0 <= label < len(self._names):  # hidden labels of a test split
                raise UserError(
                    f"{place} has the label {label}, which stands for no class",
                    "choose a split with labels",
                )
            return self._names[label]
        return str(label) if isinstance(label, int) else label


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
    if all(label.removeprefix("-").isdecimal() for label in found):
        return sorted(found, key=int)
    return sorted(found)


def _columns(data: Any) -> list[str]:
    return list(data.features or {})


def _origin(params: LoadedParams) -> str:
    return f"split {params.split} of {params.path}"


def placed(data: Any, params: LoadedParams) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and fields of each row."""
    name, rows = _name(params), enumerate(data, start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as fault:
            raise _unreadable(params, fault) from fault
        yield f"{name}:{number}", row


def _name(params: LoadedParams) -> str:
    """The name of the data in the places of rows."""
    path = Path(params.path)
    return path.name if path.is_absolute() else f"{params.path}/{params.split}"


def _without_nulls(value: Any) -> Any:
    """Plain data without the nulls that a table fills in for missing fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _load(params: LoadedParams) -> Any:
    """Load the split. Raises UserError when it cannot be loaded."""
    if datasets is None:
        raise UserError(
            "the sources dataset, labelled_dataset and image_dataset require the package datasets",
            "run `pip install 'kdcore[datasets]'`",
        )
    path = Path(params.path)
    if path.is_absolute() and not path.exists():
        raise UserError(
            f"{path} does not exist",
            "check the path, which is relative to the spec's folder, or give a hub id",
        )
    if path.is_absolute() and params.revision is not None:
        raise UserError(
            f"{path} is local data, which has no revision", "remove revision from the source"
        )
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
    try:
        saved = (path / "state.json", path / "dataset_dict.json")
        if path.is_absolute() and any(file.exists() for file in saved):
            return _saved(path, params)
        return datasets.load_dataset(
            *_place(path),
            name=params.config,
            split=params.split,
            revision=params.revision,
            streaming=params.streaming,
            **_files(path, params.encoding),
        )
    except UserError:
        raise
    except Exception as fault:  # each reader raises errors of its own
        raise _unreadable(params, fault) from fault
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _place(path: Path) -> tuple[str]:
    """The reader of a file, or the id or folder itself."""
    return (_reader(path),) if path.is_file() else (str(path),)


def _files(path: Path, encoding: str | None) -> dict[str, Any]:
    """The file, and how to read it if it is a table in text: each text stays one, also `null`."""
    if not path.is_file():
        return {}
    if READERS[_suffix(path)] != "csv":
        return {"data_files": str(path)}
    encoding = encoding or "utf-8-sig"
    delimiter = delimiter_of(header_of(path, encoding))
    written = {"sep": delimiter, "encoding": encoding, "keep_default_na": False}
    return {"data_files": str(path)} | written


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _reader(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in READERS:
        raise UserError(
            f"{path}: the format '{suffix}' is unknown",
            f"use {', '.join(READERS)}, or {', '.join(s + '.gz' for s in ('.jsonl', '.csv'))}",
        )
    return READERS[suffix]


def _saved(path: Path, params: LoadedParams) -> Any:
    """A split of a folder from ``save_to_disk``."""
    found = datasets.load_from_disk(str(path))
    if params.config is not None:
        raise UserError(f"{path} was saved without configurations", "remove config")
    if not isinstance(found, datasets.DatasetDict):
        if params.split != "train":
            raise UserError(
                f"{path} holds one split, and the source names '{params.split}'", "remove split"
            )
        return found
    if params.split not in found:
        raise UserError(
            f"{path} has no split '{params.split}'", f"choose one of {', '.join(found)} (split)"
        )
    return found[params.split]


def _unreadable(params: LoadedParams, fault: Exception) -> UserError:
    """The cause and the cure of an error of datasets, in one line each."""
    cause = fault.__cause__ if type(fault).__name__ == "DatasetGenerationError" else None
    text = " ".join(str(cause or fault).split()) or type(fault).__name__
    low = text.lower()
    if isinstance(cause or fault, UnicodeError):
        cure = "set encoding in the source, e.g. to cp1252, or save the file as UTF-8"
    elif "tokenizing" in low:
        cure = "put a text with delimiters or line ends into quotation marks"
    elif "gated" in low or "authenticated" in low:
        cure = "accept its terms on its page at huggingface.co, then run `hf auth login`"
    elif "offline" in low:
        cure = "unset HF_HUB_OFFLINE to download it once, or name local data"
    elif "reach" in low or isinstance(fault, ConnectionError):
        cure = "check the connection to huggingface.co, or name local data"
    elif "config" in low and "split" not in low:
        cure = "set config to one of its configurations"
    elif "split" in low:
        cure = "set split to one of its splits"
    elif "exist" in low or "access" in low:
        cure = "check the hub id (OWNER/NAME), or write ./PATH for local data"
    else:
        cure = "check the data, or convert them to .parquet or .jsonl"
    return UserError(f"{params.path} cannot be read: {text[:300]}", cure)
