"""An environment of its own for plugin packages: what is installed here, and what pip adds."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

KDCORE = "from kdcore_cli.console_script import main; main()"
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")

Python = Callable[..., str]


def environment(folder: Path) -> Python:
    """Make it; what is returned runs Python there with arguments and gives what it printed.

    ``cwd``: where, by default the folder. ``code``: the exit code that is expected.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    # addsitedir, unlike a bare path, also reads the .pth files there, e.g. of an editable install
    here = sysconfig.get_path("purelib")
    (site / "what_is_here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    interpreter = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"

    def run(*arguments: str | Path, cwd: Path = folder, code: int = 0) -> str:
        done = subprocess.run(
            [interpreter, *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run
