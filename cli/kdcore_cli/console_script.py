"""Console script, which handles Ctrl-C even while the slow imports run."""

from __future__ import annotations

import sys

from kdcore_cli.interruption import AGAIN


def main() -> None:
    """Run the command line and exit with its code; Ctrl-C gives 130 also during the imports."""
    try:
        from kdcore_cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before `run`, or a second one while it reported the first
        print(f"interrupted: {AGAIN}", file=sys.stderr)
        code = 130
    sys.exit(code)
