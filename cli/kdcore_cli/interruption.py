"""A command that Ctrl-C ended, and what its user may do then."""

from __future__ import annotations

AGAIN = "run the command again"


class Interrupted(Exception):
    """Says what to do then, where that is not to run the command again."""
