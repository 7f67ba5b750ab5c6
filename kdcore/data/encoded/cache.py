"""The cache of encoded rows on disk: what it holds, and the removal of what is no longer used.

A process that reads a folder of rows holds a shared lock on its manifest, also through the workers
that it forks. Only a folder without such a lock is removed: it is renamed first, so that no process
finds a part of it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kdcore.errors import UserError
from kdcore.models.folder.files import cache_folder
from kdcore.runs.whole_files import PART

try:
    import fcntl
except ImportError:  # on Windows, where a file that is mapped into memory cannot be renamed
    fcntl = None  # type: ignore[assignment]

LIMIT_GB = 50.0
"""Maximum size of the cache in 1e9 bytes, unless ``KDCORE_CACHE_GB`` says otherwise."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of the cache.

    Attributes:
        folder: The folder; its name ends in `PART` if a process was killed while it wrote it.
        bytes: Its size.
        used: When it was last opened, in seconds since 1970.
    """

    folder: Path
    bytes: int
    used: float

    def remove(self) -> bool:
        """Remove the folder.

        Returns:
            False if a process reads or writes it.
        """
        gone = self.folder.with_name(f".removed-{os.getpid()}-{self.folder.name}")
        name = self.folder.name.removesuffix(PART)
        try:
            with FileLock(self.folder.with_name(f"{name}.lock"), timeout=0):
                if not _unread(self.folder / MANIFEST):
                    return False
                self.folder.rename(gone)
        except (OSError, Timeout):
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True


def rows_folder() -> Path:
    """The folder that has a folder for each set of encoded rows."""
    return cache_folder() / "rows"


def entries() -> list[Entry]:
    """List the folders of the cache, the one first that was not used for longest."""
    found = []
    for folder in rows_folder().glob("*"):
        with suppress(OSError):  # another process may remove it
            if folder.is_dir():
                files = [each.stat() for each in folder.iterdir()]
                marked = folder / MANIFEST
                used = (marked if marked.exists() else folder).stat().st_mtime
                found.append(Entry(folder, sum(each.st_size for each in files), used))
    return sorted(found, key=lambda entry: entry.used)


def hold(folder: Path) -> int:
    """Mark a folder as used, and keep it from being removed.

    Args:
        folder: The folder.

    Returns:
        A file descriptor; the folder is not removed before it is closed.

    Raises:
        FileNotFoundError: The folder is not there, or is being removed.
    """
    path = folder / MANIFEST
    lock = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        _lock(lock, shared=True)
    if not path.exists():
        os.close(lock)
        raise FileNotFoundError(path)
    with suppress(OSError):  # a cache that cannot be written to
        os.utime(path)
    return lock


def make_room(keep: Path, note: Callable[[str], None]) -> None:
    """Remove the folders that were not used for longest until the cache has its maximum size.

    Args:
        keep: The folder that was just written.
        note: Receiver of a line about what is removed.

    Raises:
        UserError: ``KDCORE_CACHE_GB`` is not a size.
    """
    found, limit = entries(), _limit()
    size = sum(entry.bytes for entry in found)
    removed: list[Entry] = []
    for entry in found:
        if size <= limit:
            break
        if entry.folder != keep and entry.remove():
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


def _unread(manifest: Path) -> bool:
    """Whether no process reads a folder; one that is not written to its end has no readers."""
    if not manifest.exists():
        return True
    with manifest.open("rb") as file:
        try:
            _lock(file.fileno(), shared=False)
        except OSError:
            return False
    return True


def _lock(file: int, *, shared: bool) -> None:
    """Lock a file until its descriptor is closed, or raise OSError at once."""
    if fcntl is not None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind | fcntl.LOCK_NB)
