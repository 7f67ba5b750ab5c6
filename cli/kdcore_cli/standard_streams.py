"""Standard streams that are closed, cannot be written, or whose reader is gone.

A command ends quietly when nobody reads its results any more (``kdcore ... | head -1``), with the
code of a program that SIGPIPE ends. Progress is not the work: without its reader a run goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import IO, Any

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


def prepare_streams() -> None:
    """Open the null device for closed streams, and let errors of stdout name it.

    Without the null device, the next file that is opened, e.g. a checkpoint, gets the number of the
    closed stream, and what libraries print goes into it. A character that the encoding of a stream
    does not have is printed as its code.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(null, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Results(sys.stdout.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            line_buffering=sys.stdout.line_buffering,
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop(stream: IO[str]) -> None:
    """Send what a stream still holds, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
