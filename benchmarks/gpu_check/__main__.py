"""One part in a process of its own: ``python -m gpu_check PART SIZE SECONDS FILE``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from gpu_check.section import Section, failure
from gpu_check.sizes import SIZES


def main(part: str, size: str, seconds: str, file: str) -> int:
    """Measure a part, write its entries to a file, and return the exit code."""
    try:
        module = importlib.import_module(f"gpu_check.{part}")
        section = Section(Path(file), module.NAMES, float(seconds))
    except Exception as fault:  # e.g. a package that is not installed
        Path(file).write_text(json.dumps(failure(fault)))
        return 1
    module.measure(section, SIZES[size])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
