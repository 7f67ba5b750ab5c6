"""Console script, which handles Ctrl-C and SIGTERM even while the slow imports run."""

from __future__ import annotations

import sys

from kdcore.runs import interruption
from kdcore_cli.interruption import AGAIN
from kdcore_cli.standard_streams import prepare_streams


def main() -> None:
    """Run the command line and exit with its code; an interruption gives 130 at any time."""
    try:
        interruption.stop_on_signals()
        prepare_streams()
        from kdcore_cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before `run`, or a second one while it reported the first
        print(f"interrupted: {AGAIN}", file=sys.stderr)
        code = 130
    except Exception:
        if not interruption.was_interrupted():
            raise
        print(f"interrupted: {AGAIN}", file=sys.stderr)  # an import failed by the interruption
        code = 130
    interruption.ignore_signals()
    sys.exit(code)
