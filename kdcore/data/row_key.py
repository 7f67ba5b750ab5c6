"""What stands for a row in a store on disk, whatever its place and its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from kdcore.records import Row


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
