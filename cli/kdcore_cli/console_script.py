"""The console script, which is ready for Ctrl-C before it imports what takes a second."""

from __future__ import annotations

import sys

from kdcore_cli.interruption import AGAIN


def main() -> None:
    """Run the command line. Ctrl-C ends it in one way, while the libraries are imported too."""
    try:
        from kdcore_cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before `run`, or a second one while it was telling of the first
        print(f"interrupted: {AGAIN}", file=sys.stderr)
        code = 130
    sys.exit(code)
