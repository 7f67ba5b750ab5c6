"""A process with limits that runs a program of a model.

It protects the machine from mistakes, not from attacks: the program gets a process group and an
empty folder of its own, an environment without the caller's variables, no input, and limits of
time, memory, file size and open files. It can read what its user can read, and use the network.
Its user may start no further process or thread, unless that user is root, whom Linux exempts.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_FILE_BYTES, _OPEN_FILES = 2**24, 64

_LIMITED = """
import resource, runpy, sys
done = sys.argv.pop()
seconds, memory, file_bytes, files = map(int, sys.argv[1:])
limits = [
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, file_bytes),
    (resource.RLIMIT_NOFILE, files),
    (resource.RLIMIT_NPROC, 0),
    (resource.RLIMIT_CORE, 0),
]
for limit, most in limits:
    resource.setrlimit(limit, (most, most))
del sys.argv[1:]
create = open  # the program may have another
runpy.run_path("program.py", run_name="__main__")
create(done, "w").close()
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a program.

    Attributes:
        seconds: Maximum time, by the clock.
        memory_mb: Maximum address space in MB.
    """

    seconds: float
    memory_mb: int


def passes(program: str, limits: Limits) -> bool:
    """Run a program in a process with limits.

    Args:
        program: The code.
        limits: Its limits.

    Returns:
        Whether it ran to its last line without an error. A program that exits early fails.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = Path(folder, f"done-{secrets.token_hex(16)}")
        # a lone surrogate is no text of a program
        Path(folder, "program.py").write_text(program, "utf-8", errors="replace")
        return _ends(folder, str(done), limits) and done.exists()


def _ends(folder: str, done: str, limits: Limits) -> bool:
    """Whether the program in a folder ends in time, with exit status 0.

    It creates the file ``done`` after its last line.
    """
    numbers = math.ceil(limits.seconds) + 1, limits.memory_mb * 2**20, _FILE_BYTES, _OPEN_FILES
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", "-c", _LIMITED, *map(str, numbers), done],
        cwd=folder,
        env={
            "HOME": folder,
            "TMPDIR": folder,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limits.seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):  # what it started runs in its group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
