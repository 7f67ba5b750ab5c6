"""Streams that are closed or full, or whose reader is gone: quiet, and no harm to the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREPARED = "from kdcore_cli.standard_streams import prepare_streams; prepare_streams()\n"


def without_reader(words: list[str], stream: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program, one stream of which is a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: pipe}
        return subprocess.run(words, text=True, check=False, cwd=folder, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "words", [["plugins", "list"], ["plugins", "list", "--json"], ["init", "spec.yaml"], ["--help"]]
)
def test_a_command_whose_results_nobody_reads_ends_as_by_sigpipe(
    words: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kdcore_cli", *words]
    done = without_reader(command, "stdout", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    if words[0] == "init":
        assert (tmp_path / "spec.yaml").is_file(), "what was written stays"


def test_progress_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    script = f"""{PREPARED}
import sys
from kdcore_cli.terminal import console
from kdcore_cli.terminal.progress import Lines
for _ in range(3):
    Lines(console.err()).note("a line")
    console.say("bold", "error", "a line")
    print("a line of a library", file=sys.stderr, flush=True)
print("done")
"""
    done = without_reader([sys.executable, "-c", script], "stderr", tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    script = f"""{PREPARED}
import os, sys
with open("weights", "w") as file:
    assert file.fileno() > 2
    os.write(1, b"noise of a library")
    print("results"); print("progress", file=sys.stderr); assert sys.stdin.read() == ""
"""
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script]
    assert subprocess.run(words, cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "weights").read_bytes() == b""


def test_results_that_cannot_be_printed_are_told_as_such(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kdcore_cli", "schema"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the results cannot be printed: No space left on device",
        "  fix: send stdout to another file",
    ]
