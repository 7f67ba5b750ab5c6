"""Files of one JSON object per line."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcore.errors import GZIP, UserError, not_utf8, unreadable

WHERE = "the spec's folder (for an option, to the working directory)"
"""Folder that the path of a source is relative to."""
LONGEST = 2**26
"""Bytes of a line; a file without line ends would fill the memory."""
NAMED = 5
"""Most further lines that a message names."""


def lines_of(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Read the lines of a file that are not blank.

    Args:
        path: The file.

    Yields:
        Number, offset and bytes of each line.

    Raises:
        UserError: The file cannot be read, or a line is too long.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), start=1):
                if len(line) == LONGEST:
                    raise UserError(
                        f"{path.name}:{number} is longer than {LONGEST >> 20} MiB",
                        "write one JSON object per line",
                    )
                if line.removeprefix(BOM_UTF8).strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as fault:
        raise unreadable(path, fault, WHERE) from fault


def row_of(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
    """Read a line.

    Args:
        path: Its file.
        number: Its number, from 1.
        line: Its bytes.

    Returns:
        The place of the line in messages, and its object.

    Raises:
        UserError: The line is not a JSON object in UTF-8.
    """
    place = f"{path.name}:{number}"
    if b"\0" in line and line[:2] not in (BOM_UTF16_LE, BOM_UTF16_BE, GZIP):
        raise UserError(
            f"{place} contains NUL bytes: the file is in UTF-16, or damaged",
            "save it as UTF-8, or copy it again",
        )
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as fault:
        raise not_utf8(path, fault) from fault
    except json.JSONDecodeError as fault:
        where = f"{fault.msg.removesuffix(' at')} at column {fault.colno}"
        raise UserError(
            f"{place} is not valid JSON: {where}{_also_invalid(path, number)}",
            "write one JSON object per line, or remove what is not one",
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise UserError(
            f"{place} has a number with thousands of digits, or thousands of nested brackets",
            "write one JSON object per line",
        ) from fault
    if not isinstance(row, dict):
        raise UserError(
            f"{place} must be a JSON object, not a {type(row).__name__}",
            "write one JSON object per line",
        )
    if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{place} contains an incomplete surrogate pair", "fix its \\uD... escapes")
    return place, row


def _also_invalid(path: Path, number: int) -> str:
    """Name the lines after the first invalid one that are not valid JSON either."""
    if not path.is_file():
        return ""
    found = []
    for other, _, line in lines_of(path):
        try:
            json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            found += [other] if other > number else []
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    named = ", ".join(map(str, found[:NAMED]))
    return f" (and lines {named}{more})" if found else ""
