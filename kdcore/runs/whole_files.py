"""Atomic writes: a file is complete or absent, even if the writing process is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kdcore.errors import UserError

PART = ".kdcore-part"
"""The ending of a temporary path. Nothing else has it: what bears it may be removed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors for want of space: on the disk, of the user, or in one file."""


def beside(path: Path) -> Path:
    """Return the temporary path of a file or folder while it is written."""
    return path.with_name(path.name + PART)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Provide a temporary path to write to, and rename it to ``path`` when the block succeeds.

    An existing file is replaced; a folder must not exist. If the block raises, the temporary file
    stays. A link at the temporary path is removed, since it would redirect the write.

    Args:
        path: The final path.

    Yields:
        The temporary path.
    """
    if beside(path).is_symlink():
        beside(path).unlink()
    with naming(path):
        yield beside(path)
    beside(path).replace(path)


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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole` for a folder; the remains of a killed process are removed first."""
    with whole(path) as place:
        shutil.rmtree(place, ignore_errors=True)
        yield place


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts, as UTF-8, in one step."""
    with whole(path) as place, place.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)


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
        UserError: The folder has contents, is a symbolic link, or cannot be written.
    """
    if output.is_symlink():
        raise UserError(f"{output} is a symbolic link to {output.readlink()}", "use a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists", "use a new folder")
    refuse_unwritable(output, "use a writable folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Create a folder of a user's choice atomically; see `whole_folder`.

    Args:
        output: The new folder.

    Yields:
        The temporary path.

    Raises:
        UserError: The folder above it is not writable.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise unwritable(output, fault, "use a writable folder") from fault
    with whole_folder(output) as place:
        yield place
