"""The file that `generate` writes answers to, next to which it grows until it is whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from kdcore.errors import UserError
from kdcore.runs.whole_files import beside, naming, unwritable


def refuse_taken(out: Path, own: bool = False) -> None:
    """Raises UserError if a file exists, or its temporary file, unless that is one's own."""
    if out.exists():
        raise UserError(f"{out} already exists", "name another file with --out")
    if not own and beside(out).exists():
        raise UserError(
            f"{beside(out)} holds the answers of a command that is running or was interrupted",
            "wait for that command, delete the file, or name another file with --out",
        )


@contextmanager
def opened(out: Path | None) -> Iterator[TextIO]:
    """Open a temporary file next to ``out``, which is renamed to ``out`` at the end.

    After an error the temporary file remains, unless it is empty.
    """
    if out is None:
        yield sys.stdout
        return
    place = beside(out)
    try:
        file = place.open("x", encoding="utf-8")
    except FileExistsError:
        refuse_taken(out)  # it was created since the first look
        raise UserError(f"another command was writing {out}", "rerun the command") from None
    except OSError as fault:
        raise unwritable(out, fault, "name a file in a writable folder") from None
    with naming(out), file:
        try:
            refuse_taken(out, own=True)  # by a command that has just ended
            yield file
        except BaseException:
            if not place.stat().st_size:
                place.unlink()
            raise
    place.replace(out)
