"""Shards of rows on disk, written atomically, and the keys by which rows are found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.method.records import Row
from kdcore.runs.whole_files import whole


def shards(folder: Path) -> list[Path]:
    """The complete shards of a folder, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def next_shard(folder: Path) -> int:
    """The number after those of all shards of a folder."""
    return 1 + max((int(path.stem.rpartition("-")[2]) for path in shards(folder)), default=-1)


def add_shard(
    folder: Path, tensors: Any, save: Callable[[Any, Path], None], number: int | None = None
) -> None:
    """Write a shard.

    Args:
        folder: The folder of the shards.
        tensors: Named tensors or arrays.
        save: The ``save_file`` of safetensors for this kind of tensors.
        number: Number of the shard (default: the next one).
    """
    number = next_shard(folder) if number is None else number
    path = folder / f"shard-{number:05d}.safetensors"
    with whole(path) as place:
        save(tensors, place)


def grouped(
    rows: Iterable[tuple[bytes, Row]], size: Callable[[Row], int], least: int
) -> Iterator[list[tuple[bytes, Row]]]:
    """Group rows, in order, until each group has enough positions.

    Args:
        rows: Keys and rows.
        size: Number of positions of a row.
        least: Minimum number of positions of a group; the last group may have fewer.

    Yields:
        Groups of keys and rows.
    """
    part: list[tuple[bytes, Row]] = []
    positions = 0
    for key, row in rows:
        part.append((key, row))
        positions += size(row)
        if positions >= least:
            yield part
            part, positions = [], 0
    if part:
        yield part


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
