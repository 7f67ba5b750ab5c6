"""The loading of data through Hugging Face datasets, and its errors in one line each."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kdcore.components.optional_packages import import_early, optional_package
from kdcore.errors import UserError, first_line, special_file, unreadable
from kdcore_baselines.sources.components import LoadedParams
from kdcore_baselines.sources.csv_format import delimiter_of, header_of
from kdcore_baselines.sources.json_lines import WHERE

datasets: Any = import_early("datasets")

Found = TypeVar("Found")

READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Reader of datasets by the suffix of a file, before .gz if it is compressed."""


def origin_of(params: LoadedParams) -> str:
    """The name of the data in messages."""
    return f"split {params.split} of {params.path}"


def placed(data: Any, params: LoadedParams) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and fields of each row."""
    name = name_of(params)
    for number, row in enumerate(readable(data, params), start=1):
        yield f"{name}:{number}", row


def readable(data: Iterable[Found], params: LoadedParams) -> Iterator[Found]:
    """Yield what datasets reads. Raises UserError in place of its errors."""
    found = iter(data)
    while True:
        try:
            each = next(found)
        except StopIteration:
            return
        except Exception as fault:
            raise refused_data(params, fault) from fault
        yield each


def name_of(params: LoadedParams) -> str:
    """The name of the data in the places of rows."""
    path = Path(params.path)
    return path.name if path.is_absolute() else f"{params.path}/{params.split}"


def without_nulls(value: Any) -> Any:
    """Plain data without the nulls that a table fills in for missing fields."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def load(params: LoadedParams) -> Any:
    """Load the split. Raises UserError when it cannot be loaded."""
    optional_package("datasets", "kdcore[datasets]", "a source of Hugging Face datasets")
    path = Path(params.path)
    if path.is_absolute() and not path.exists():
        if path.is_symlink():
            raise unreadable(path, FileNotFoundError(), WHERE)
        raise UserError(
            f"{path} does not exist",
            "check the path, which is relative to the spec's folder, or give a hub id",
        )
    if path.is_absolute() and not path.is_file() and not path.is_dir():
        raise special_file(path)
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
            found = _saved(path, params)
            return found.to_iterable_dataset() if params.streaming else found
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
        raise refused_data(params, fault) from fault
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
    if READERS[suffix_of(path)] != "csv":
        return {"data_files": str(path)}
    encoding = encoding or "utf-8-sig"
    delimiter = delimiter_of(header_of(path, encoding))
    written = {"sep": delimiter, "encoding": encoding, "keep_default_na": False}
    return {"data_files": str(path)} | written


def suffix_of(path: Path) -> str:
    """The suffix that tells the reader of a file, without that of a compressed one."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _reader(path: Path) -> str:
    suffix = suffix_of(path)
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


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__


def refused_data(params: LoadedParams, fault: Exception) -> UserError:
    """The cause and the cure of an error of datasets, in one line each."""
    for each in _chain(fault):
        if isinstance(each, PermissionError):
            return unreadable(Path(each.filename or params.path), each, WHERE)
        if isinstance(each, EOFError | zlib.error | gzip.BadGzipFile):
            return UserError(
                f"{params.path} cannot be read: {first_line(each)}",
                "copy or download it again: it is cut off, damaged or not compressed",
            )
        if isinstance(each, StopIteration):  # of the reader of an empty file
            return UserError(f"{params.path} has no rows", "name a file with at least one row")
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
    elif "any data files" in low:
        cure = f"name a file, or a folder with files of {', '.join(READERS)}"
    elif "config" in low and "split" not in low:
        cure = "set config to one of its configurations"
    elif "split" in low:
        cure = "set split to one of its splits"
    elif "exist" in low or "access" in low:
        cure = "check the hub id (OWNER/NAME), or write ./PATH for local data"
    else:
        cure = "check the data, or convert them to .parquet or .jsonl"
    return UserError(f"{params.path} cannot be read: {text[:300]}", cure)
