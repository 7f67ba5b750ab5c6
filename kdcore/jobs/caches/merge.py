"""Merge teacher caches that several machines built, or one of many small shards, into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kdcore.data.caches.manifest import refuse_difference
from kdcore.data.caches.shard_folder import Location, add_shard, next_shard
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.data.store import RowKeys, first_of_each
from kdcore.errors import UserError
from kdcore.jobs.caches.build import least_of_shard
from kdcore.jobs.caches.writing import being_written
from kdcore.runs.progress import Progress, Silent

_Arrays = dict[str, NDArray[Any]]


def merge_caches(
    folder: Location,
    sources: Sequence[Location],
    *,
    shard: int | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Add the rows of caches to a cache, which is created if the folder has none.

    Rows that the cache has are skipped, so a merge that was killed continues.

    Args:
        folder: The folder of the merged cache, or its URL.
        sources: The folders or URLs of the caches, which stay as they are.
        shard: Minimum of learned positions per shard (default: as in
            `kdcore.jobs.caches.build.build_cache`).
        progress: The display of the merge (default: none).

    Returns:
        The merged cache.

    Raises:
        UserError: The caches have different origins, one is damaged or is the merged one, or the
            folder holds other files.
    """
    if any(_same(each, folder) for each in sources):
        raise UserError(f"{folder} would be merged into itself", "choose another folder")
    caches = [TeacherCache(each) for each in sources]
    manifest = caches[0].manifest
    for cache in caches[1:]:
        refuse_difference(cache.folder, cache.manifest, asdict(manifest))
    with being_written(folder, manifest) as refuse_other:
        known = TeacherCache(folder)
        keys = RowKeys(np.concatenate([cache.keys_by_shard() for cache in caches]))
        wanted = first_of_each(keys) & ~known.contains(keys)
        least = shard or least_of_shard(sum(cache.positions for cache in caches), manifest)
        with (progress or Silent()).stage("merge the caches", int(wanted.sum())) as stage:
            for number, part in enumerate(_parts(caches, wanted, least), next_shard(folder)):
                refuse_other()
                add_shard(folder, part, save_file, number)
                stage.advance(len(part["keys"]))
    return TeacherCache(folder)


def _same(one: Location, other: Location) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one).rstrip("/") == str(other).rstrip("/")


def _parts(
    caches: Sequence[TeacherCache], wanted: NDArray[np.bool_], least: int
) -> Iterator[_Arrays]:
    """Yield the arrays of shards of the wanted rows, which are in the order of the caches."""
    held: list[_Arrays] = []
    positions = first = 0
    for cache in caches:
        for arrays in cache.arrays_by_shard():
            rows = len(arrays["keys"])
            kept = wanted[first : first + rows]
            first += rows
            if not kept.any():
                continue
            at = np.repeat(kept, arrays["counts"])
            by_row = ("keys", "counts")
            held.append({n: each[kept if n in by_row else at] for n, each in arrays.items()})
            positions += int(at.sum())
            if positions >= least:
                yield _joined(held)
                held, positions = [], 0
    if held:
        yield _joined(held)


def _joined(parts: Sequence[_Arrays]) -> _Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
