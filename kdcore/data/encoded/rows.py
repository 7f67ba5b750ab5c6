"""Encoded rows in a folder, open for reading as a sequence of rows.

| file | content |
| --- | --- |
| ``rows-N.arrow`` | record batches of `kdcore.data.encoded.table`, in one file if all numbers fit |
| ``lengths.npy`` | [R] int32, the number of positions of each row |
| ``contents.npy`` | [R] uint64, `kdcore.data.store.content_key` of all rows, sorted |
| ``tokens.npy`` | [2, M] int64, the learned labels and how often each occurs |
| ``manifest.json`` | number of rows in each batch, digest of the rows, and the `Summary` |

The files are mapped into memory, so that the processes of a machine share them. A process keeps
the pages of at most `HELD` bytes of rows that it read.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcore.data.encoded.cache import MANIFEST
from kdcore.data.encoded.table import BatchReader
from kdcore.data.store import RowKeys
from kdcore.method.protocols import Compact
from kdcore.method.records import Row
from kdcore.models.folder.kept_files import hold

HELD = 2**25
"""Bytes of mapped pages after which a process lets go of them."""
_PAGE = 2**16
"""Bytes that the operating system maps around a row."""


@dataclass(slots=True)
class Some:
    """A number of rows, and the ids of the first three of them."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, id: str) -> None:
        """Count a row."""
        self.merge(Some(1, [id]))

    def merge(self, other: Some) -> None:
        """Count the rows of another count, which follow these."""
        self.number += other.number
        self.first = [*self.first, *other.first][:3]

    def __str__(self) -> str:
        return ", ".join(self.first) + (", ..." if self.number > len(self.first) else "")


@dataclass(slots=True)
class Summary:
    """What the encoding of rows found.

    Attributes:
        examples: Number of examples.
        dropped: Rows without a learned token, which are not kept.
        full: Kept rows as long as rows may be.
        notes: Note -> rows that carry it.
        left_out: Examples of the data that the source does not give.
    """

    examples: int = 0
    dropped: Some = field(default_factory=Some)
    full: Some = field(default_factory=Some)
    notes: dict[str, Some] = field(default_factory=dict)
    left_out: Some = field(default_factory=Some)

    def kept(self, rows: Iterable[Row], max_length: int) -> list[Row]:
        """Count rows, and return those that are kept."""
        found = []
        for row in rows:
            self.examples += 1
            for note in row.notes:
                self.notes.setdefault(note, Some()).add(row.id)
            if not row.mask.any():
                self.dropped.add(row.id)
                continue
            found.append(row)
            if len(row.inputs.get("input_ids", ())) == max_length:
                self.full.add(row.id)
        return found

    def merge(self, other: Summary) -> None:
        """Count the rows of another summary, which follow these."""
        self.examples += other.examples
        self.dropped.merge(other.dropped)
        self.full.merge(other.full)
        self.left_out.merge(other.left_out)
        for note, some in other.notes.items():
            self.notes.setdefault(note, Some()).merge(some)

    def plain(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Summary:
        """The summary of its plain data."""
        notes = {note: Some(**some) for note, some in plain["notes"].items()}
        dropped, full, left = (Some(**plain[name]) for name in ("dropped", "full", "left_out"))
        return cls(plain["examples"], dropped, full, notes, left)


class EncodedRows(Sequence[Row]):
    """The rows of a folder.

    Args:
        folder: A folder that `kdcore.data.encoded.encode` has written.
        compact: The form in which the rows lie there (default: as they are).

    Attributes:
        summary: What the encoding of the rows found.
        digest: The `kdcore.data.store.rows_digest` of the rows.

    Raises:
        FileNotFoundError: The folder is not there.
    """

    def __init__(self, folder: Path, compact: Compact | None = None) -> None:
        self.folder, self._compact = folder, compact
        weakref.finalize(self, os.close, hold(folder))
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        self.summary = Summary.of(manifest["summary"])
        self.digest: str = manifest["digest"]
        self._starts: list[int] = [0, *accumulate(manifest["batches"])]
        self._read = 0
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedRows, (self.folder, self._compact)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        at = range(len(self))[place]
        number = bisect_right(self._starts, at) - 1
        row = self._reader(number).row(at - self._starts[number])
        self._let_go(_PAGE)
        return row if self._compact is None else self._compact.restore(row)

    def __iter__(self) -> Iterator[Row]:
        for place in range(len(self)):
            yield self[place]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[R] int32, the number of positions of each row."""
        lengths: NDArray[np.int32] = self._array("lengths")
        return lengths

    @property
    def contents(self) -> NDArray[np.uint64]:
        """[R] uint64, the content keys of all rows, sorted."""
        contents: NDArray[np.uint64] = self._array("contents")
        return contents

    @property
    def tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[M] int64 learned labels, and [M] int64 how often each occurs."""
        labels, counts = self._array("tokens")
        return labels, counts

    @property
    def teachers(self) -> list[str]:
        """What the data says of the teacher of each row."""
        columns = (self._batch(n).column("teacher") for n in range(len(self._of)))
        return [each for column in columns for each in column.to_pylist()]

    def keys(self) -> RowKeys:
        """The `kdcore.data.store.row_key` of each row."""
        found = np.empty((len(self), 16), np.uint8)
        for number, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            column = self._batch(number).column("key")
            found[start:end] = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 16)
            self._let_go(column.nbytes)
        return RowKeys(found)

    def _open(self) -> None:
        """Map the files, and forget the batches of earlier maps."""
        self._maps: list[Any] = []
        self._files: list[Any] = []
        for path in sorted(self.folder.glob("rows-*.arrow")):
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._files.append(pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._maps[-1]))))
        self._of = [(f, n) for f in self._files for n in range(f.num_record_batches)]
        self._readers: dict[int, BatchReader] = {}

    def _batch(self, number: int) -> Any:
        file, place = self._of[number]
        return file.get_batch(place)

    def _reader(self, number: int) -> BatchReader:
        if number not in self._readers:
            self._readers[number] = BatchReader(self._batch(number))
        return self._readers[number]

    def _let_go(self, touched: int) -> None:
        """Return the mapped pages to the operating system, which keeps them for a next read."""
        self._read += touched
        if self._read >= HELD and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self._read = 0

    def _array(self, name: str) -> Any:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")
