"""The teacher's top-k classes at every learned position, on disk: the teacher runs once.

A folder contains ``manifest.json``, which states the origin of the cache, and shards, each written
to a temporary file and renamed. The tensors of a shard of R rows with N learned positions in total:

| tensor | shape | |
| --- | --- | --- |
| ``keys`` | [R, 16] uint8 | `row_key` of each row |
| ``counts`` | [R] int32 | number of learned positions of each row |
| ``ids`` | [N, k] uint16 | ids of the top k classes, most likely first; int32 if V > 65,536 |
| ``logp`` | [N, k - 1] float16 | their log-probs at temperature 1, without the first |
| ``tail`` | [N] float16 | log of the total mass of the other V - k classes |

`kdcore.data.best_classes` explains the last three. Rows are found by their content, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from kdcore.data.best_classes import CachedLogits, refuse_more_classes
from kdcore.data.caches.manifest import Manifest, damaged, manifest_of, refuse_difference
from kdcore.data.caches.shard_folder import Damaged, Location, ShardFolder, add_shard
from kdcore.data.rows import row_keys
from kdcore.data.store import RowIndex, RowKeys
from kdcore.errors import UserError
from kdcore.method.objective import Objective
from kdcore.method.records import Row
from kdcore.models.device import sent
from kdcore.models.loading.loaded import LoadedModel

STORED = ("ids", "logp", "tail")
"""The arrays of a shard with a line for each position."""


class TeacherCache:
    """A teacher cache, open for reading.

    Attributes:
        folder: The folder of the cache.
        manifest: Its manifest.

    Raises:
        UserError: The folder does not contain a cache, or the cache is damaged or of another
            format.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.manifest = manifest_of(folder)
        self._shards = ShardFolder(folder, "np")
        try:
            self._places = RowIndex(self._shards.keyed())
        except Damaged as fault:
            raise damaged(fault.path) from fault

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder,)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._places)

    @property
    def positions(self) -> int:
        """The number of learned positions of all rows."""
        return self._places.positions

    @property
    def size(self) -> int:
        """The size on disk in bytes."""
        return self._shards.size

    def logits(self, keys: Sequence[bytes], device: torch.device) -> CachedLogits:
        """The teacher's logits at the learned positions of some rows, row by row.

        Args:
            keys: Keys of the rows.
            device: The device of the result.

        Returns:
            The logits of all N positions.
        """
        return self.taken(self.arrays(keys), device)

    def arrays(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """Read what `taken` makes logits of, which a worker of a loader can do.

        Args:
            keys: Keys of the rows.

        Returns:
            ``ids`` [N, k] int64, ``logp`` [N, k - 1] and ``tail`` [N] float32, and ``counts`` [R]
            int64, the number of positions of each row, on the CPU.

        Raises:
            UserError: A shard is damaged.
        """
        rows = [self.stored(key) for key in keys]
        wide = {name: np.int64 if name == "ids" else np.float32 for name in STORED}
        whole = {n: np.concatenate([row[n] for row in rows]).astype(wide[n]) for n in STORED}
        counts = torch.tensor([len(row["tail"]) for row in rows])
        return {"counts": counts} | {name: torch.from_numpy(each) for name, each in whole.items()}

    def taken(self, arrays: Mapping[str, Tensor], device: torch.device) -> CachedLogits:
        """The logits of what `arrays` read, on a device."""
        ids, logp, tail = (sent(arrays[name], device) for name in STORED)
        return CachedLogits(ids, logp, tail, self.manifest.classes)

    def contains(self, keys: RowKeys) -> NDArray[np.bool_]:
        """Whether it has each of some rows: [N] bool."""
        return self._places.contains(keys)

    def keys_by_shard(self) -> NDArray[np.uint8]:
        """The keys [R, 16] of the rows of all shards, in their order."""
        return np.concatenate([np.empty((0, 16), np.uint8), *(k for k, _ in self._shards.keyed())])

    def arrays_by_shard(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the arrays of each shard. Raises UserError for a damaged one."""
        for number in range(len(self._shards)):
            shard = self._shard(number)
            yield {name: shard.get_tensor(name) for name in ("keys", "counts", *STORED)}

    def _shard(self, number: int) -> Any:
        try:
            return self._shards[number]
        except Damaged as fault:
            raise damaged(fault.path) from fault

    def stored(self, key: bytes) -> dict[str, NDArray[Any]]:
        """The arrays of a row as they are stored: ``ids``, ``logp`` and ``tail``."""
        number, start, end = self._places[key]
        shard = self._shard(number)  # once for all three
        return {name: shard.get_slice(name)[start:end] for name in STORED}

    def refuse_other_origin(
        self, first: LoadedModel, classes: int, *, is_teacher: bool = True
    ) -> None:
        """Check that the cache fits the models of a run.

        Args:
            first: The teacher, or the student of a run whose only teacher is the cache.
            classes: Number of classes V.
            is_teacher: Whether ``first`` is the teacher.

        Raises:
            UserError: The cache has another origin.
        """
        asked = asdict(Manifest.of(first, classes, self.manifest.k)) | {"date": self.manifest.date}
        if not is_teacher:
            asked["computed"] = self.manifest.computed
        if not (is_teacher and first.has_weights):  # there is no digest to compare
            asked["teacher"] = self.manifest.teacher
        refuse_difference(self.folder, self.manifest, asked)

    def refuse_method(self, objective: Objective) -> None:
        """Check that the cache has enough classes for the components of a method.

        Args:
            objective: The method.

        Raises:
            UserError: A component needs more of the teacher's classes than the cache contains.
        """
        refuse_more_classes(
            objective,
            self.manifest.k,
            self.manifest.classes,
            f"{self.folder} contains only",
            "remove data.teacher_cache, build a wider cache (--k)",
        )

    def keys_of(self, rows: Sequence[Row], wanted: NDArray[np.bool_] | None = None) -> RowKeys:
        """The keys of some rows, which the cache must contain.

        Args:
            rows: The R rows.
            wanted: [R] bool, the rows that the cache must contain (default: all).

        Returns:
            The key of each row.

        Raises:
            UserError: The cache lacks some of the rows.
        """
        keys = row_keys(rows)
        lacks = ~self._places.contains(keys)
        missing = np.flatnonzero(lacks if wanted is None else lacks & wanted)
        if len(missing):
            first = rows[int(missing[0])].id
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {len(rows)} rows, e.g. {first}",
                "run `kdcore cache build` with this spec to add them",
            )
        return keys

    def check_shards(self) -> None:
        """Check the shapes and values of all shards.

        Raises:
            UserError: A shard is damaged.
        """
        for number, path in enumerate(self._shards.paths):
            shard = self._shard(number)
            k, classes = self.manifest.k, self.manifest.classes
            ids, logp, tail = (shard.get_tensor(name) for name in ("ids", "logp", "tail"))
            count = int(shard.get_tensor("counts").sum())
            shaped = (ids.shape, logp.shape, tail.shape) == ((count, k), (count, k - 1), (count,))
            if not (shaped and np.isfinite(logp).all() and (tail <= 0).all()) or (
                count and not 0 <= ids.min() <= ids.max() < classes
            ):
                raise damaged(path)


def write_shard(
    folder: Location,
    manifest: Manifest,
    rows: Sequence[tuple[bytes, int]],
    best: Iterable[Any],
    number: int | None = None,
) -> None:
    """Write a shard, atomically.

    Args:
        folder: The folder of the cache, or its URL.
        manifest: Its manifest.
        rows: Key and number of learned positions of each row.
        best: The `kdcore.data.best_classes.Best` of each row.
        number: Number of the shard (default: the next one).
    """
    ids, logp, tail = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(key for key, _ in rows), np.uint8).reshape(-1, 16),
        "counts": np.array([count for _, count in rows], np.int32),
        "ids": ids.astype(manifest.ids),
        "logp": logp,
        "tail": tail,
    }
    add_shard(folder, tensors, save_file, number)
