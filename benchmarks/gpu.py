"""What kdcore does on a GPU: step times, decoding speeds, equal outputs, and every command once.

    python benchmarks/gpu.py [--out FILE] [--seconds 480] [--size 1b|tiny] [--only PART] > gpu.json

Everything is made in code, random Llamas (1b: the shape of Llama 3.2 1B) and a tokenizer; nothing
is downloaded. Each part has a process of its own, so that a crash of one leaves the others, and a
share of the time that is left, after which it is killed. An entry that failed is
``{"error": ...}``, and the exit code is then 1; one for which no time was left says so. ``--out``
holds the report after each part.

It runs on a CPU too (``--size tiny``), where memory and host waits are null. kdcore need not be
installed: this checkout is used where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check.section import LEFT_OUT, has_error

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"machine": 1, "training": 3, "decoding": 4, "commands": 2}
"""The parts, each with its share of the time: what one leaves goes to those after it."""
PLUGINS = "kdcore.v1"
"""The group of entry points through which kdcore finds its plugins."""


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the report, too")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all parts together")
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b", help="size of the models")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    return parser.parse_args()


def search_path(folder: Path) -> list[str]:
    """The folders in which a part finds kdcore and its plugins.

    Args:
        folder: A folder for the metadata of an installation, where kdcore is not installed.

    Returns:
        The folders for PYTHONPATH.
    """
    ours = [str(ROOT / "benchmarks")]
    if find_spec("kdcore") and entry_points(group=PLUGINS):
        return ours
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"kdcore-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kdcore\nVersion: {project['version']}\n"
    )
    lines = [f"{name} = {place}" for name, place in project["entry-points"][PLUGINS].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{PLUGINS}]", *lines]) + "\n")
    return [*ours, str(folder), *(str(ROOT / place) for place in ("", "plugins", "cli"))]


def entries_of(part: str, size: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure a part in a process of its own.

    Args:
        part: The name of the part.
        size: The name of the size.
        seconds: The time after which the process is killed.
        folder: A folder for its file.

    Returns:
        The entries; an ``error`` beside them if the process did not end well.
    """
    file = folder / f"{part}.json"
    words = [sys.executable, "-m", "gpu_check", part, size, str(seconds), str(file)]
    ended = {}
    try:
        code = subprocess.run(words, stdout=sys.stderr, timeout=seconds).returncode
        if code:
            ended = {"error": f"the process ended with exit code {code}"}
    except subprocess.TimeoutExpired:
        ended = {"error": f"killed after {seconds:.0f} s: the time ended"}
    return ended | (json.loads(file.read_text()) if file.exists() else {})


def time_for(parts: Sequence[str], left: float) -> float:
    """The seconds of the first of some parts, so that one that hangs leaves some to the others.

    Args:
        parts: The part and those after it.
        left: The seconds left for all of them.

    Returns:
        Its share of them.
    """
    return left * PARTS[parts[0]] / sum(PARTS[part] for part in parts)


def main() -> int:
    """Run the parts, print the report, and return the exit code."""
    asked = arguments()
    began = time.monotonic()
    report: dict[str, Any] = {"size": asked.size}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        paths = [*search_path(folder), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["HF_HUB_OFFLINE"] = "1"
        parts = asked.only or list(PARTS)
        for place, part in enumerate(parts):
            left = time_for(parts[place:], asked.seconds - (time.monotonic() - began))
            report[part] = entries_of(part, asked.size, left, folder) if left > 0 else LEFT_OUT
            report["seconds"] = time.monotonic() - began
            if asked.out:
                asked.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return int(has_error(report))


if __name__ == "__main__":
    sys.exit(main())
