"""A teacher cache that a command writes: its folder, locked, with the manifest of what is added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from kdcore.data.caches.manifest import Manifest, manifest_of, refuse_difference
from kdcore.data.caches.shard_folder import MANIFEST, Location, created, names_in, new_file
from kdcore.errors import UserError
from kdcore.models.folder.kept_files import cache_folder
from kdcore.runs.whole_files import PART


@contextmanager
def being_written(folder: Location, manifest: Manifest) -> Iterator[Callable[[], None]]:
    """Lock a cache folder, created if necessary, and check or write its manifest.

    A remote folder is locked for the processes of this machine alone. Writers on other machines
    may add shards at the same time, but of two that create the cache, the later manifest remains.

    Args:
        folder: The folder, or its URL.
        manifest: The manifest of what is written.

    Yields:
        A function to call before each shard, which raises UserError if another writer has begun
        a cache of a different origin here.

    Raises:
        UserError: The folder holds other files or a cache of a different origin, it cannot be
            written, or another process is writing it.
    """
    found = names_in(folder)
    if MANIFEST not in found and found - {"lock", f"{MANIFEST}{PART}"}:  # of a killed build
        raise UserError(
            f"{folder} contains files that are not a teacher cache",
            "choose another folder with --out",
        )
    created(folder)

    def refuse_other() -> None:
        refuse_difference(folder, manifest_of(folder), asdict(manifest))

    try:
        with FileLock(_lock_of(folder), timeout=0):
            if MANIFEST in names_in(folder):
                refuse_other()
            else:
                with new_file(folder, MANIFEST) as place:
                    place.write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
            yield refuse_other
    except Timeout:
        raise UserError(
            f"another process is building {folder}",
            "wait until it ends, or choose another folder with --out",
        ) from None


def _lock_of(folder: Location) -> Path:
    if isinstance(folder, Path):
        return folder / "lock"
    locks = cache_folder() / "caches"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{hashlib.sha256(folder.rstrip('/').encode()).hexdigest()[:32]}.lock"
