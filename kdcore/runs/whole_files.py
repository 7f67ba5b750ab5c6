"""Atomic writes: a file is complete or absent, even if the writing process is killed.

| function | what is written | who else may write it |
| --- | --- | --- |
| `whole` | a file or a folder | nobody: it is in a run's folder, or the caller has locked it |
| `write_text` | a text | anybody: each writes all of it, and the last text remains |
| `new_folder` | a folder of a user's choice | one process creates it, others are refused |
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kdcore.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows, which refuses to rename a file that another process has open
    fcntl = None  # type: ignore[assignment]

PART = ".kdcore-part"
"""The ending of a temporary path. Nothing else has it: what bears it may be removed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors for want of space: on the disk, of the user, or in one file."""
_PATIENCE = 5.0
"""Seconds to wait for another process that writes the same file, which takes it milliseconds."""


def beside(path: Path) -> Path:
    """Return the temporary path of a file or folder while it is written."""
    return path.with_name(path.name + PART)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Provide a temporary path, and rename it to ``path`` when the block succeeds.

    For a path that no other process writes, as in a run's folder or under a lock. An existing file
    is replaced; a folder must not exist. If the block raises, what it wrote stays until the next
    call removes it.

    Args:
        path: The final path.

    Yields:
        The temporary path, at which nothing is: the block makes the file or the folder.
    """
    place = beside(path)
    remove(place)  # also a link, which would redirect the write
    with naming(path):
        yield place
    place.replace(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a path in the errors of the block that name none, as that of a full disk.

    An error without a number shows its own text.
    """
    try:
        yield
    except (OSError, SafetensorError) as fault:
        if getattr(fault, "filename", None) is None and getattr(fault, "errno", 0) is not None:
            fault.filename = str(path)  # type: ignore[union-attr]
        raise


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts, as UTF-8, in one step.

    Several processes may write the same file: each writes all of it, and the last text remains.

    Args:
        path: The file, which is replaced if it exists.
        text: The text, or its parts.

    Raises:
        OSError: The file cannot be written; nothing of it remains.
        UserError: Another process has been writing the file for seconds.
    """
    with _sole_writer(path, folder=False) as place:
        try:
            with naming(path), place.open("w", encoding="utf-8") as file:
                file.writelines([text] if isinstance(text, str) else text)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        place.replace(path)


@contextmanager
def _sole_writer(path: Path, *, folder: bool) -> Iterator[Path]:
    """Create the temporary file or folder of a path, or take over that of a killed process.

    It is locked by itself, so that no other file has to be removed afterwards. Where the file
    system has no locks, nothing keeps writers apart. Raises UserError if a living process has it.
    """
    place, patience = beside(path), time.monotonic() + _PATIENCE
    while (lock := _locked(place, folder)) is None:
        if time.monotonic() > patience:
            kind = "folder" if folder else "file"
            raise UserError(
                f"another process is writing {path}", f"wait until it ends, or name another {kind}"
            )
        time.sleep(0.02)
    try:
        yield place
    finally:
        os.close(lock)


def _locked(place: Path, folder: bool) -> int | None:
    """Open a temporary path and lock it; None if another process has it or has just renamed it."""
    with suppress(FileNotFoundError):
        kind = place.lstat().st_mode
        if not (stat.S_ISDIR(kind) if folder else stat.S_ISREG(kind)):
            place.unlink()  # a link or a pipe would redirect the write
    if folder:
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        lock = os.open(place, os.O_NOFOLLOW | (os.O_RDONLY if folder else os.O_RDWR))
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(lock), place.lstat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:  # a file system without locks
        ours = True
    if not ours:
        os.close(lock)
    return lock if ours else None


def unwritable(path: Path, fault: OSError, elsewhere: str) -> UserError:
    """The mistake that a file or a folder cannot be written.

    Args:
        path: The file or the folder.
        fault: The system's error.
        elsewhere: The cure that names another place, as an imperative.

    Returns:
        The mistake; on a full disk the cure begins with it.
    """
    cure = f"free disk space, or {elsewhere}" if fault.errno in FULL else elsewhere
    return UserError(f"{path} cannot be written: {fault.strerror}", cure)


def refuse_unwritable(folder: Path, cure: str) -> None:
    """Check that a folder can be created, or written if it exists.

    Args:
        folder: The folder.
        cure: The cure in the message.

    Raises:
        UserError: The folder, or the nearest one above it that exists, is not writable.
    """
    near = next(filter(os.path.lexists, [folder, *folder.parents]))
    if not near.is_dir():
        what = "a file" if near.is_file() else "not a folder"
        raise UserError(f"{folder} cannot be written: {near} is {what}", cure)
    if not os.access(near, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {near} is not writable", cure)


def refuse_existing(output: Path) -> None:
    """Check that an output folder is new or empty, and that it can be written.

    Args:
        output: The folder.

    Raises:
        UserError: The path does not name a new folder, is a symbolic link, has contents, or cannot
            be written.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output} does not name a new folder", f"use e.g. {output / 'new'}")
    if output.is_symlink():
        raise UserError(f"{output} is a symbolic link to {output.readlink()}", "use a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists", "use a new folder")
    refuse_unwritable(output, "use a writable folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Create a folder of a user's choice atomically, as the only process that does.

    Args:
        output: The new folder.

    Yields:
        The temporary folder, which is empty.

    Raises:
        UserError: The folder above it is not writable, another process is creating the folder, or
            has created it meanwhile.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise unwritable(output, fault, "use a writable folder") from fault
    with _sole_writer(output, folder=True) as place:
        try:
            refuse_existing(output)
            for left in place.iterdir():  # of a killed process
                remove(left)
            with naming(output):
                yield place
            try:
                place.replace(output)
            except OSError:
                refuse_existing(output)  # another program has created it
                raise
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
