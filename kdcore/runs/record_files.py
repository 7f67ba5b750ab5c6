"""The JSON files of a run folder: each holds one record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field, TypeAdapter

from kdcore.errors import UserError

Record = TypeVar("Record")

LEFT_OUT = Field(exclude_if=lambda value: value is None or value == {} or value == [])
"""Annotation of a field that the file omits when it is None or empty."""


@dataclass(frozen=True)
class RecordFile(Generic[Record]):
    """A JSON file of a run folder and the record that it holds.

    A reader ignores keys that the record lacks, and a key that the file lacks has the record's
    default, so that folders of other versions can be read.

    Attributes:
        name: The file's name in the run folder.
        record: The type of the record, or a list of it.
        indent: Spaces of indentation per level; None writes one line.
        ensure_ascii: Whether other characters are escaped, so that any string can be written.
    """

    name: str
    record: type[Record]
    indent: int | None = None
    ensure_ascii: bool = True

    def text(self, record: Record) -> str:
        """Return the file's content for a record."""
        return json.dumps(self.plain(record), indent=self.indent, ensure_ascii=self.ensure_ascii)

    def read(self, path: Path) -> Record:
        """Read the record in a file.

        Raises:
            UserError: The file does not hold such a record.
        """
        with as_written(path):
            return self.of_plain(json.loads(path.read_text("utf-8")))

    def plain(self, record: Record) -> Any:
        """Return a record as JSON data."""
        return self._adapter.dump_python(record)

    def of_plain(self, data: Any) -> Record:
        """Return the record of JSON data.

        Raises:
            ValueError: The data is not such a record.
        """
        return self._adapter.validate_python(data)

    @cached_property
    def _adapter(self) -> TypeAdapter[Record]:
        return TypeAdapter(self.record)


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turn errors of the block, which reads a file's content, into a message that names the file.

    Raises:
        UserError: The content is wrong.
    """
    try:
        yield
    except (OSError, ValueError, RecursionError) as fault:
        lines = str(fault).splitlines()
        where = f": {lines[1]}" if len(lines) > 1 else ""
        raise UserError(
            f"{path} does not have the format that kdcore writes{where}",
            "remove the file, or repeat the run",
        ) from fault


def differences(left: Any, right: Any, path: str = "") -> set[str]:
    """Compare two trees of plain data.

    Args:
        left: One tree.
        right: The other.
        path: Dotted path of both.

    Returns:
        The dotted paths at which they differ.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        return {
            found
            for key in left.keys() | right.keys()
            for found in differences(left.get(key), right.get(key), f"{path}.{key}".lstrip("."))
        }
    return set() if left == right else {path}
