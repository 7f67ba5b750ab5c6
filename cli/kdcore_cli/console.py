"""Where the command line writes: results to stdout, all else to stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from kdcore.registry import Registry

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def say(style: str, label: str, text: str) -> None:
    """A labelled message on stderr, its lines never wrapped: they may be searched or copied."""
    for line in text.splitlines():
        err.print(Text.assemble((f"{label}: ", style), line), soft_wrap=True)


def mistake(cause: str, cure: str) -> None:
    """What the user got wrong, and what to do about it."""
    say("bold red", "error", cause)
    say("bold green", "  fix", cure)


def warn_of_problems(registry: Registry) -> None:
    """One line for each plugin that did not load and that nobody asked for."""
    for problem in registry.problems:
        say("yellow", "warning", str(problem))


def print_json(data: Any) -> None:
    """Data for another program."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
