"""The cache of encoded rows on disk, and its maximum size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kdcore.errors import UserError
from kdcore.models.folder.kept_files import Entry, cache_folder, entries

LIMIT_GB = 50.0
"""Maximum size of the cache in 1e9 bytes, unless ``KDCORE_CACHE_GB`` says otherwise."""
MANIFEST = "manifest.json"
KIND = "rows"
"""The kind of the entries, see `kdcore.models.folder.kept_files`."""


def rows_folder() -> Path:
    """The folder that has a folder for each set of encoded rows."""
    return cache_folder() / KIND


def make_room(keep: Path, note: Callable[[str], None]) -> None:
    """Remove the folders that were not used for longest until the cache has its maximum size.

    Args:
        keep: The folder that was just written.
        note: Receiver of a line about what is removed.

    Raises:
        UserError: ``KDCORE_CACHE_GB`` is not a size.
    """
    found, limit = entries(KIND), _limit()
    size = sum(entry.bytes for entry in found)
    removed: list[Entry] = []
    for entry in found:
        if size <= limit:
            break
        if entry.path != keep and entry.remove():
            removed.append(entry)
            size -= entry.bytes
    if removed:
        freed = sum(entry.bytes for entry in removed) / 1e9
        days = (time.time() - removed[-1].used) / 86_400
        note(
            f"removed {freed:.2f} GB of encoded rows from {rows_folder()}, which were not used for "
            f"{days:.0f} days or longer: KDCORE_CACHE_GB sets the maximum size, {limit / 1e9:g} GB"
        )


def _limit() -> float:
    said = os.environ.get("KDCORE_CACHE_GB")
    try:
        size = LIMIT_GB if said is None else float(said)
    except ValueError:
        size = -1.0
    if not size >= 0:
        raise UserError(
            f"the environment variable KDCORE_CACHE_GB is '{said}', which is not a size in GB",
            "set it to a number, e.g. 50, or unset it",
        )
    return size * 1e9
