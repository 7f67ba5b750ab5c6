"""Rows on disk: their groups, and the keys by which they are found there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcore.method.records import Row


def grouped(
    rows: Iterable[tuple[bytes, int]], size: Callable[[int], int], least: int
) -> Iterator[list[tuple[bytes, int]]]:
    """Group rows, in order, until each group has enough positions.

    Args:
        rows: Keys and places of rows.
        size: Number of positions of the row at a place.
        least: Minimum number of positions of a group; the last group may have fewer.

    Yields:
        Groups of keys and places.
    """
    part: list[tuple[bytes, int]] = []
    positions = 0
    for key, place in rows:
        part.append((key, place))
        positions += size(place)
        if positions >= least:
            yield part
            part, positions = [], 0
    if part:
        yield part


class RowKeys(Sequence[bytes]):
    """The keys of rows, in 16 bytes each.

    Args:
        array: [R, 16] uint8.
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> RowKeys:
        """The keys of a list of them."""
        return cls(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, place: int) -> bytes: ...

    @overload
    def __getitem__(self, place: slice) -> RowKeys: ...

    def __getitem__(self, place: int | slice) -> bytes | RowKeys:
        found = self.array[place]
        return RowKeys(found) if isinstance(place, slice) else found.tobytes()


class RowIndex:
    """Where the rows of shards are, by their keys, in 40 bytes each.

    Args:
        shards: Keys [R, 16] uint8 and numbers of positions [R] of the rows of each shard. The last
            of rows with the same key counts.

    Raises:
        ValueError: The keys of a shard are not those of its rows.
    """

    def __init__(self, shards: Sequence[tuple[NDArray[np.uint8], NDArray[Any]]]) -> None:
        for of_shard, counts in shards:
            if of_shard.shape != (len(counts), 16):
                raise ValueError(f"{len(counts)} rows have keys of the shape {of_shard.shape}")
        keys = _comparable(np.concatenate([np.empty((0, 16), np.uint8), *(k for k, _ in shards)]))
        ends = [np.cumsum(counts, dtype=np.int64) for _, counts in shards]
        places = [
            np.stack([np.full(len(end), number), end - counts, end], 1)
            for number, (end, (_, counts)) in enumerate(zip(ends, shards, strict=True))
        ]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        self._keys = keys[last]
        self._places = np.concatenate([np.empty((0, 3), np.int64), *places])[order[last]]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.contains(RowKeys.of([key]))[0])

    def __getitem__(self, key: bytes) -> tuple[int, int, int]:
        """The shard of a row, its first position there, and their end."""
        place = int(np.searchsorted(self._keys, _comparable(RowKeys.of([key]).array)[0]))
        shard, start, end = self._places[place].tolist()
        return shard, start, end

    @property
    def keys(self) -> RowKeys:
        """The keys of the rows, in ascending order."""
        return RowKeys(self._keys.view(np.uint8).reshape(-1, 16))

    @property
    def positions(self) -> int:
        """The number of positions of all rows."""
        return int((self._places[:, 2] - self._places[:, 1]).sum())

    def contains(self, keys: RowKeys) -> NDArray[np.bool_]:
        """Whether each of some keys is there: [N] bool."""
        asked = _comparable(keys.array)
        if not len(self):
            return np.zeros(len(asked), bool)
        places = np.searchsorted(self._keys, asked)
        found: NDArray[np.bool_] = self._keys[np.minimum(places, len(self) - 1)] == asked
        return found


def first_of_each(keys: RowKeys) -> NDArray[np.bool_]:
    """Whether each of some keys is the first of its value: [N] bool."""
    found = np.zeros(len(keys), bool)
    found[np.unique(_comparable(keys.array), return_index=True)[1]] = True
    return found


def _comparable(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Keys [N, 16] as [N] texts of 16 bytes, which numpy sorts."""
    return np.ascontiguousarray(keys).view("S16")[:, 0]


def row_key(row: Row) -> bytes:
    """A key of 16 bytes: the truncated sha256 of a row's inputs and mask."""
    digest = hashlib.sha256()
    for name, tensor in [*sorted(row.inputs.items()), ("mask", row.mask)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits(tensor))
    return digest.digest()[:16]


def content_key(row: Row) -> int:
    """A key of 8 bytes: the truncated sha256 of a row's inputs and labels."""
    tensors = [row.inputs[name] for name in sorted(row.inputs)] + [row.labels]
    content = b"".join(bits(tensor) for tensor in tensors)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU."""
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return plain.contiguous().numpy().tobytes()


def rows_digest(rows: Iterable[Row]) -> str:
    """The sha256 of the inputs, masks and labels of rows in order; their ids do not count."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row))
        digest.update(bits(row.labels))
    return digest.hexdigest()
