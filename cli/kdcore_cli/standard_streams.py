"""Standard streams that are closed, cannot be written, or whose reader is gone.

A command ends quietly when nobody reads its results any more (``kdcore ... | head -1``), with the
code of a program that SIGPIPE ends. Progress is not the work: without its reader a run goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

READER_GONE = 141
"""Exit code of a command whose results nobody reads: 128 + SIGPIPE, which Python ignores."""
STDOUT = "stdout"
"""The file that an error of `_Results` names."""
_STREAMS = (("stdin", "r"), (STDOUT, "w"), ("stderr", "w"))


class _Results(io.FileIO):
    """Stdout, whose errors say so: those of other files and pipes mean something else."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as fault:
            raise OSError(fault.errno, fault.strerror, STDOUT) from None


class _Messages(io.FileIO):
    """Stderr, whose errors nobody could be told of; a run does not fail for its progress."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Open the null device for closed streams, name stdout in its errors, and drop stderr's.

    Without the null device, the next file that is opened, e.g. a checkpoint, gets the number of the
    closed stream, and what libraries print goes into it.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(null, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    sys.stdout, sys.stderr = _over(sys.stdout, _Results), _over(sys.stderr, _Messages)


def _over(stream: TextIO, raw: type[io.FileIO]) -> TextIO:
    """A stream of the same file and encoding, which shows the code of what it cannot encode."""
    if not isinstance(stream, io.TextIOWrapper):  # replaced by a program that calls us
        return stream
    stream.flush()
    file = raw(stream.fileno(), "w", closefd=False)
    at_once = stream.write_through  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        file if at_once else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=at_once,
    )


def drop_results() -> None:
    """Send what stdout still holds, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
