"""Rows as Arrow record batches, bit by bit: each tensor is a column of lists.

A column's metadata holds the tensor's dtype. Whole numbers of 64 bits take the narrowest of 8, 32
and 64 bits that holds all of a file, so token ids take 32 bits. A tensor that does not have exactly
one dimension has a second column with its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcore.data.source import Compact
from kdcore.data.store import bits, content_key, row_key
from kdcore.errors import UserError
from kdcore.method.records import Row

FORMAT = 3
"""Version of the files and of the code that encodes rows; other versions are encoded again."""

_INPUT, _SHAPE = "input ", "shape of "
_WIDTHS = (np.int8, np.int32, np.int64)
_STORED = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}
"""Dtypes that numpy or Arrow lists lack -> the dtype of the same size that holds their bits."""


def to_batch(rows: Sequence[Row], compact: Compact | None = None) -> pa.RecordBatch:
    """Convert rows.

    Args:
        rows: At least one row.
        compact: The form in which the inputs are stored; the keys are those of the rows.

    Returns:
        The record batch.

    Raises:
        UserError: Two rows have different inputs, or different dtypes of one.
    """
    first = rows[0]
    for row in rows:
        if row.inputs.keys() != first.inputs.keys():
            raise UserError(
                f"{row.id} has the inputs {', '.join(row.inputs)}, and {first.id} has "
                f"{', '.join(first.inputs)}",
                "fix the data source: all of its rows need the same inputs",
            )
    small = rows if compact is None else [compact.shrink(row) for row in rows]
    tensors = {f"{_INPUT}{name}": [row.inputs[name] for row in small] for name in first.inputs}
    tensors |= {"labels": [row.labels for row in rows], "mask": [row.mask for row in rows]}
    fields: list[pa.Field] = []
    arrays: list[pa.Array] = []
    for name, each in tensors.items():
        for field, array in _columns(name, each, [row.id for row in rows]):
            fields.append(field)
            arrays.append(array)
    others = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "notes": pa.array([list(row.notes) for row in rows], pa.list_(pa.string())),
        "teacher": pa.array([row.teacher for row in rows], pa.string()),
        "key": pa.array([row_key(row) for row in rows], pa.binary(16)),
        "content": pa.array([content_key(row) for row in rows], pa.uint64()),
    }
    fields += [pa.field(name, array.type) for name, array in others.items()]
    return pa.record_batch([*arrays, *others.values()], schema=pa.schema(fields))


def wider(one: pa.Schema, other: pa.Schema) -> pa.Schema | None:
    """The schema that holds the batches of both; None if no schema does."""
    if one.names != other.names:
        return None
    fields = []
    for left, right in zip(one, other, strict=True):
        if left.metadata != right.metadata:
            return None
        if left.type != right.type:
            bits = [each.type.value_type.bit_width for each in (left, right)]
            left = left if bits[0] > bits[1] else right
        fields.append(left)
    return pa.schema(fields)


def digested(batch: pa.RecordBatch) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a batch that `kdcore.data.store.rows_digest` hashes, in its order."""
    column = batch.column("labels")
    dtype = getattr(torch, batch.schema.field("labels").metadata[b"dtype"].decode())
    values = _restored(column.values.to_numpy(zero_copy_only=True), dtype)
    labels, size = memoryview(bits(values)), values.element_size()
    ends = [size * offset for offset in column.offsets.to_pylist()]
    for key, start, end in zip(batch.column("key").to_pylist(), ends, ends[1:], strict=False):
        yield key
        yield labels[start:end]


class BatchReader:
    """The rows of a record batch, whose memory it shares.

    Args:
        batch: A record batch of `to_batch`.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._ids, self._notes = batch.column("id"), batch.column("notes")
        self._teachers = batch.column("teacher")
        self._tensors = {
            field.name: (
                batch.column(place).offsets.to_numpy(),
                batch.column(place).values.to_numpy(zero_copy_only=True),
                getattr(torch, field.metadata[b"dtype"].decode()),
            )
            for place, field in enumerate(batch.schema)
            if field.metadata
        }
        shapes = [name for name in batch.schema.names if name.startswith(_SHAPE)]
        self._shapes = {name.removeprefix(_SHAPE): batch.column(name) for name in shapes}

    def row(self, place: int) -> Row:
        """Return a row, whose tensors have memory of their own."""
        tensors = {name: self._tensor(name, place) for name in self._tensors}
        labels, mask = tensors.pop("labels"), tensors.pop("mask")
        inputs = {name.removeprefix(_INPUT): each for name, each in tensors.items()}
        notes = tuple(self._notes[place].as_py())
        id, teacher = self._ids[place].as_py(), self._teachers[place].as_py()
        return Row(inputs, labels, mask, id, notes, teacher)

    def _tensor(self, name: str, place: int) -> Tensor:
        offsets, values, dtype = self._tensors[name]
        found = _restored(values[offsets[place] : offsets[place + 1]], dtype)
        if name in self._shapes:
            found = found.view(self._shapes[name][place].as_py())
        return found


def _restored(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A tensor with memory of its own."""
    found = torch.from_numpy(values.copy())
    return found.view(dtype) if dtype in _STORED else found.to(dtype)


def _columns(
    name: str, tensors: Sequence[Tensor], ids: Sequence[str]
) -> Iterator[tuple[pa.Field, pa.Array]]:
    """Yield the columns of a tensor, its values and, if necessary, its shapes."""
    dtype = tensors[0].dtype
    for tensor, id in zip(tensors, ids, strict=True):
        if tensor.dtype != dtype:
            raise UserError(
                f"the {name} of {id} is {tensor.dtype}, and that of {ids[0]} is {dtype}",
                "fix the data source: all of its rows need the same dtypes",
            )
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    stored: NDArray[Any] = flat.view(_STORED.get(dtype, dtype)).numpy()
    if dtype == torch.int64:
        least, most = (int(stored.min()), int(stored.max())) if len(stored) else (0, 0)
        fits = (np.iinfo(width).min <= least <= most <= np.iinfo(width).max for width in _WIDTHS)
        stored = stored.astype(next(w for w, fit in zip(_WIDTHS, fits, strict=True) if fit))
    yield _lists(name, [tensor.numel() for tensor in tensors], stored, {"dtype": str(dtype)[6:]})
    if any(tensor.ndim != 1 for tensor in tensors):
        sizes = np.array(list(chain.from_iterable(each.shape for each in tensors)), np.int32)
        yield _lists(f"{_SHAPE}{name}", [tensor.ndim for tensor in tensors], sizes, None)


def _lists(
    name: str, sizes: Sequence[int], values: NDArray[Any], metadata: dict[str, str] | None
) -> tuple[pa.Field, pa.Array]:
    offsets = np.cumsum([0, *sizes], dtype=np.int32)
    array = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.field(name, array.type, metadata=metadata), array
