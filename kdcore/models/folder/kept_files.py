"""What kdcore keeps on a machine to make or fetch it once, and the removal of what nobody uses.

``KDCORE_CACHE``, by default ~/.cache/kdcore, has a folder for each kind of it, and that one an
entry, a file or a folder, for each thing. A process that reads an entry holds a shared lock on it,
also through the workers that it forks; one that writes it holds ``NAME.lock``. Only an entry
without both is removed: it is renamed first, so that no process finds a part of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kdcore.runs.whole_files import PART, whole

try:
    import fcntl
except ImportError:  # on Windows, where a file that is mapped into memory cannot be renamed
    fcntl = None  # type: ignore[assignment]

KINDS = ("caches", "gguf", "openvino", "rows", "sha256", "shards")
"""The names of the folders. Others in ``KDCORE_CACHE`` are not kdcore's, and stay."""
_LOCK = ".lock"
_made: dict[Path, int] = {}
"""What `made_once` gave this process, which may read it until it ends."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder that is kept.

    Attributes:
        path: Its path; the name ends in `PART` if a process was killed while it wrote it.
        bytes: Its size.
        used: When it was last opened, in seconds since 1970.
    """

    path: Path
    bytes: int
    used: float

    def remove(self) -> bool:
        """Remove the entry.

        Returns:
            False if a process reads or writes it.
        """
        gone = self.path.with_name(f".removed-{os.getpid()}-{self.path.name}")
        lock = self.path.with_name(self.path.name.removesuffix(PART) + _LOCK)
        try:
            with ExitStack() as locked:
                if lock.exists():  # nobody writes what has none: it is renamed to its place
                    locked.enter_context(FileLock(lock, timeout=0))
                locked.enter_context(_unread(self.path))
                self.path.rename(gone)
        except (OSError, Timeout):
            return False
        if gone.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink(missing_ok=True)
        return True


def cache_folder() -> Path:
    """The folder of all that is kept: ``KDCORE_CACHE``, or ~/.cache/kdcore."""
    return Path(os.environ.get("KDCORE_CACHE", "~/.cache/kdcore")).expanduser()


def entries(kind: str) -> list[Entry]:
    """List the entries of a kind, the one first that was not used for longest.

    Args:
        kind: The name of its folder, which need not exist.
    """
    found = []
    for path in (cache_folder() / kind).glob("*"):
        with suppress(OSError):  # another process may remove it
            if path.suffix != _LOCK:
                files = [each.lstat().st_size for each in path.rglob("*") if not each.is_dir()]
                about = path.stat()
                size = sum(files) if path.is_dir() else about.st_size
                found.append(Entry(path, size, about.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def hold(path: Path) -> int:
    """Mark an entry as used, and keep it from being removed.

    Args:
        path: Its path.

    Returns:
        A file descriptor; the entry is not removed before it is closed.

    Raises:
        FileNotFoundError: The entry is not there, or is being removed.
    """
    if fcntl is None:
        path.stat()
        return os.open(os.devnull, os.O_RDONLY)
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FileNotFoundError(path) from None
    except OSError:  # a file system without locks
        pass
    if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
        os.close(lock)
        raise FileNotFoundError(path)
    with suppress(OSError):  # a cache that cannot be written to
        os.utime(path)
    return lock


def held_folder(path: Path) -> int:
    """Create a folder unless it exists, and `hold` it.

    Args:
        path: Its path.

    Returns:
        A file descriptor; the folder is not removed before it is closed.
    """
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed in between
            return hold(path)


def made_once(path: Path, write: Callable[[Path], None]) -> Path:
    """Let the first call make an entry; other processes wait for it.

    The entry is not removed before this process ends.

    Args:
        path: The final path.
        write: Function of a temporary path, at which it makes the file or folder.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + _LOCK)):
        if not path.exists():
            with whole(path) as place:
                write(place)
        if path not in _made:
            _made[path] = hold(path)
    return path


@contextmanager
def _unread(path: Path) -> Iterator[None]:
    """Keep processes from reading an entry. Raises OSError if one reads it."""
    if fcntl is None:
        yield
        return
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
