"""The user's mistakes, as opposed to ours."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_NAMES = 24
"""As many as a message lists."""
GZIP = b"\x1f\x8b"
"""The first bytes of a file that is compressed by gzip."""
RERUN = "rerun with resume=True if the spec is unchanged, else with overwrite=True"
"""The cure after a run failed: a plugin or the data may be mended, or the spec."""
_LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""What ``str.splitlines`` takes as the end of a line."""


def one_line(text: str) -> str:
    r"""Write line ends out as escapes, e.g. ``\n``.

    A message quotes names of files, columns and runs, which may contain any character.
    """
    return _LINE_ENDS.sub(lambda found: ascii(found[0])[1:-1], text)


class UserError(Exception):
    """A mistake the user can mend: one plain line of cause and one of cure.

    The command line prints both and exits with code 2, without a traceback. Line ends inside the
    lines, as of a quoted file name, are escaped.

    Attributes:
        cause: What is wrong.
        cure: What to type or change.
        field: The field of the spec that is wrong, as ``--set`` takes it; "" if it is not known.
        placed: Whether ``cause`` begins with the place of the field in the spec's file.
    """

    placed = False

    def __init__(self, cause: str, cure: str, field: str = "") -> None:
        self.cause, self.cure, self.field = one_line(cause), one_line(cure), field
        super().__init__(f"{self.cause}\n{self.cure}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker process raise it in the main process."""
        return type(self), (self.cause, self.cure, self.field)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the lines of the command line."""
        causes, cures = self.cause.splitlines(), self.cure.splitlines()
        return [*(f"error: {line}" for line in causes), *(f"  fix: {line}" for line in cures)]


class Mistakes(UserError):
    """Several mistakes in a spec: a line of cause for each, and a line for each different cure.

    Attributes:
        found: The mistakes.
        further: Number of mistakes that are not among them.
    """

    def __init__(self, found: Sequence[UserError], further: int = 0) -> None:
        super().__init__("", "")
        more = [f"... and {counted(further, 'more mistake')}"] if further else []
        self.cause = "\n".join([*(each.cause for each in found), *more])
        self.cure = "\n".join(dict.fromkeys(each.cure for each in found))
        self.args = (f"{self.cause}\n{self.cure}",)
        self.found, self.further = tuple(found), further

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.found, self.further)


class TrainingDiverged(UserError):
    """The loss became NaN or infinite; nothing after the last good checkpoint is kept."""


def first_line(fault: BaseException, most: int = 300) -> str:
    """What another library's exception says, as part of a message.

    Args:
        fault: The exception.
        most: Maximum number of characters.

    Returns:
        Its first line, or the name of its type if it says nothing.
    """
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:most]


def unreadable(path: Path, fault: OSError, relative_to: str) -> UserError:
    """The mistake that a file cannot be read, with the cure for its reason.

    Args:
        path: The file.
        fault: The system's error.
        relative_to: The folder that a path of the user's is relative to.

    Returns:
        The mistake.
    """
    if fault.errno != errno.ELOOP and path.is_symlink() and not path.exists():
        why = f"it is a link to {os.readlink(path)}, which does not exist"
        return UserError(f"{path} cannot be read: {why}", "restore that file, or name another one")
    cure = {
        errno.ENOENT: f"check the path, which is relative to {relative_to}",
        errno.ENOTDIR: f"check the path, which is relative to {relative_to}",
        errno.ELOOP: "remove the symbolic link that leads back to itself, or name another path",
        errno.EISDIR: "name a file in this folder",
        errno.EACCES: f"let its owner permit it: chmod +r {shlex.quote(str(path))}",
        errno.EPERM: f"let its owner permit it: chmod +r {shlex.quote(str(path))}",
        errno.ENXIO: "name a file; this is a socket or a device",
    }.get(fault.errno or 0, "check the disk, or copy the file again")
    return UserError(f"{path} cannot be read: {fault.strerror or fault}", cure)


def special_file(path: Path) -> UserError:
    """The mistake that data are a pipe, a socket or a device, which cannot be read twice."""
    return UserError(
        f"{path} is neither a file nor a folder", "save its contents as a file, and name that file"
    )


def not_utf8(path: Path, fault: UnicodeDecodeError) -> UserError:
    """The mistake that a file is in another encoding, or ends inside a character.

    Args:
        path: The file.
        fault: The error of the line, or of the file, that is not UTF-8.

    Returns:
        The mistake.
    """
    if fault.reason == "unexpected end of data":
        return UserError(f"{path} ends inside a character", "copy it again: its end is missing")
    if fault.object[:2] == GZIP:
        return UserError(
            f"{path} is compressed by gzip", "uncompress it (gunzip), and name the result"
        )
    marked = fault.object[:2] in (BOM_UTF16_LE, BOM_UTF16_BE)
    cause = "it is in UTF-16" if marked else fault.reason
    written = path.with_name(f"{path.stem}.utf8{path.suffix}")
    file, new = (shlex.quote(str(each)) for each in (path, written))
    encoding = "UTF-16" if marked else "CP1252"
    return UserError(
        f"{path} is not UTF-8: {cause}",
        f"save it as UTF-8, e.g. iconv -f {encoding} -t UTF-8 {file} > {new}",
    )


@contextmanager
def in_field(field: str) -> Iterator[None]:
    """Name the field of a spec in the mistakes raised inside, unless they name one.

    Args:
        field: The field, as ``--set`` takes it.
    """
    try:
        yield
    except UserError as mistake:
        mistake.field = mistake.field or field
        raise


@contextmanager
def inside(outer: str) -> Iterator[None]:
    """State of the fields in the mistakes raised inside that they are those of a part of a spec.

    Args:
        outer: The part's field, e.g. ``base``.
    """
    try:
        yield
    except UserError as mistake:
        for each in mistake.found if isinstance(mistake, Mistakes) else [mistake]:
            each.field = each.field and f"{outer}.{each.field}"
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the nearest known one, or else all of them.

    Returns e.g. ``did you mean 'speckd'?`` or ``use one of: all, speckd``.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    if not names:
        return "leave it out: none exists"
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return f"use one of: {', '.join(names[:MOST_NAMES])}{more}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun, e.g. ``1 row``, ``1,200 rows``.

    Args:
        number: The number.
        noun: The noun behind 1.
        plural: The noun behind others (default: with an s).
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def with_article(noun: str) -> str:
    """A noun behind 'a', or behind 'an' before a vowel."""
    return f"{'an' if noun[:1] in 'aeio' else 'a'} {noun}"
