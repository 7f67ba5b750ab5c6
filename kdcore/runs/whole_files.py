"""Files that are whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """Where a file or folder is while it is being written, in the same folder."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the place to write to; what is there takes ``path``'s name when the block ends well.

    A file of that name is replaced; of a folder there must be none. When the block raises, what it
    wrote stays beside. A link there would lead what is written elsewhere, and is removed.
    """
    if beside(path).is_symlink():
        beside(path).unlink()
    yield beside(path)
    beside(path).replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`; what a process that was killed left there is removed first."""
    with whole(path) as place:
        shutil.rmtree(place, ignore_errors=True)
        yield place


def write_whole(path: Path, text: str) -> None:
    """Write a text file, as UTF-8."""
    with whole(path) as place:
        place.write_text(text, "utf-8")
