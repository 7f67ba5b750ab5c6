"""The shards of a store of rows on disk, each whole or not there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kdcore.method.records import Row
from kdcore.runs.whole_files import whole


def shards(folder: Path) -> list[Path]:
    """The whole shards, in their order."""
    return sorted(folder.glob("shard-*.safetensors"))


def add_shard(folder: Path, tensors: Any, save: Callable[[Any, Path], None]) -> None:
    """Write the next shard; ``save`` is safetensors' ``save_file`` for the kind of tensors."""
    number = 1 + max((int(path.stem.rpartition("-")[2]) for path in shards(folder)), default=-1)
    path = folder / f"shard-{number:05d}.safetensors"
    with whole(path) as place:
        save(tensors, place)


def grouped(
    rows: Iterable[tuple[bytes, Row]], size: Callable[[Row], int], least: int
) -> Iterator[list[tuple[bytes, Row]]]:
    """Rows in their order, as many together as have ``least`` positions, counted by ``size``."""
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
    """16 bytes that stand for a row's inputs and which of its positions are learned."""
    digest = hashlib.sha256()
    for name, tensor in [*sorted(row.inputs.items()), ("mask", row.mask)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.digest()[:16]


def rows_digest(rows: Iterable[Row]) -> str:
    """Of all that is learned from rows, and of their order; not of their names."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row))
        digest.update(row.labels.numpy().tobytes())
    return digest.hexdigest()
