"""How a .csv file is written: its delimiter and its encoding."""

from __future__ import annotations

import gzip
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

DELIMITERS = (",", ";", "\t", "|")
FALLBACK = "cp1252"
"""Encoding of a file that is not UTF-8: spreadsheets on Windows write it."""


def delimiter_of(header: str) -> str:
    """The delimiter that occurs most often in the header of a table.

    Args:
        header: The first line.

    Returns:
        The delimiter; a comma if there is none.
    """
    return max(DELIMITERS, key=header.count)


def header_of(path: Path, encoding: str) -> str:
    """Read the first line of a file, which may be compressed by gzip.

    Args:
        path: The file.
        encoding: Its encoding; bytes that do not fit are replaced.

    Returns:
        The line.

    Raises:
        OSError: The file cannot be read.
        LookupError: The encoding is unknown.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding=encoding, errors="replace") as file:
        return str(file.readline(2**20))


def guessed_encoding(path: Path) -> str | None:
    """The encoding of a file.

    Args:
        path: The file, which may be compressed by gzip.

    Returns:
        None for UTF-8, ``utf-16`` for a file with its mark, and else ``cp1252``.

    Raises:
        OSError: The file cannot be read.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
            return "utf-16"
    try:
        with opened(path, "rt", encoding="utf-8") as text:
            while text.read(2**20):
                pass
    except UnicodeDecodeError:
        return FALLBACK
    return None
