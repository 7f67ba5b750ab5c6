"""The entries of a part: guarded, limited in time, and written to a file one by one."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LEFT_OUT = "left out: no time"
STOPPED = "stopped before it ended"
"""The error of an entry whose process crashed or was killed at the end of the time."""


class Section:
    """The entries of one part.

    Args:
        file: The JSON file that holds the entries at any time, also after a crash.
        names: The names of all entries, in their order.
        seconds: The time for the part; entries that would start later are left out.
    """

    def __init__(self, file: Path, names: Sequence[str], seconds: float) -> None:
        self._file, self._deadline = file, time.monotonic() + seconds
        self.entries: dict[str, Any] = dict.fromkeys(names, LEFT_OUT)
        self._write()

    def measure(self, name: str, work: Callable[[], Any]) -> None:
        """Set an entry to what some work returns, or to the error that it raises.

        Args:
            name: The name of the entry.
            work: A function that returns what JSON can hold.
        """
        if time.monotonic() >= self._deadline:
            return
        began = time.monotonic()
        self.entries[name] = {"error": STOPPED}
        self._write()
        try:
            self.entries[name] = work()
        except (Exception, SystemExit) as fault:
            self.entries[name] = failure(fault)
        self._write()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    def _write(self) -> None:
        whole = self._file.with_suffix(".part")
        whole.write_text(json.dumps(self.entries))
        whole.replace(self._file)


def failure(fault: BaseException) -> dict[str, Any]:
    """The entry of work that raised: the error, and the last calls that led to it."""
    calls = traceback.extract_tb(fault.__traceback__)[-6:]
    return {
        "error": traceback.format_exception_only(fault)[-1].strip(),
        "calls": [f"{'/'.join(Path(c.filename).parts[-3:])}:{c.lineno}" for c in calls],
    }


def has_error(found: Any) -> bool:
    """Whether an ``error`` stands anywhere in a report."""
    if isinstance(found, dict):
        return "error" in found or any(map(has_error, found.values()))
    return isinstance(found, list) and any(map(has_error, found))
