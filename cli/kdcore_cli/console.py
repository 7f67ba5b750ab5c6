"""Where the command line writes: results to stdout, all else to stderr.

rich is imported when something is written, not when the program starts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

from kdcore.method.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out() -> Console:
    """The terminal, or the file or pipe, that stdout is."""
    from rich.console import Console

    return Console(highlight=False)


@functools.cache
def err() -> Console:
    """The same for stderr."""
    from rich.console import Console

    return Console(highlight=False, stderr=True)


def say(style: str, label: str, text: str) -> None:
    """A labelled message on stderr, its lines never wrapped: they may be searched or copied."""
    from rich.text import Text

    for line in text.splitlines():
        err().print(Text.assemble((f"{label}: ", style), line), soft_wrap=True)


def tell(line: str) -> None:
    """A line on stdout, not wrapped and not read as markup."""
    line = line.encode("utf-8", "backslashreplace").decode()  # a path may hold what is no text
    out().print(line, soft_wrap=True, markup=False)


_OPTION_OF = {
    "resume=True": "--resume",
    "overwrite=True": "--overwrite",
    "run=FOLDER": "--out",
    "out=FILE": "--output",
}
"""What the core calls an argument of `kdcore.run` or `kdcore.report` -> the option for it here."""


def mistake(cause: str, cure: str) -> None:
    """What the user got wrong, and what to do about it, with the options of the command line."""
    for argument, option in _OPTION_OF.items():
        cause, cure = cause.replace(argument, option), cure.replace(argument, option)
    say("bold red", "error", cause)
    say("bold green", "  fix", cure)


def warn_of_problems(registry: Registry) -> None:
    """One line for each plugin that did not load and that nobody asked for."""
    for problem in registry.problems:
        say("yellow", "warning", str(problem))


def print_json(data: Any) -> None:
    """Data for another program; records as mappings, and what JSON lacks as text."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if record else str(value)
