"""Output of the command line: results go to stdout, everything else to stderr.

Control characters are shown as escapes: a row, an answer or an error cannot steer the terminal.
rich is imported at the first output, not when the program starts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import traceback
from typing import TYPE_CHECKING, Any

from kdcore.components.registry import Registry
from kdcore.errors import one_line
from kdcore_cli.terminal.control_characters import escaped, escaped_json

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out() -> Console:
    """Console that writes to stdout."""
    from kdcore_cli.terminal.safe_console import SafeConsole

    return SafeConsole()


@functools.cache
def err() -> Console:
    """Console that writes to stderr."""
    from kdcore_cli.terminal.safe_console import SafeConsole

    return SafeConsole(stderr=True)


def say(style: str, label: str, text: str) -> None:
    """Print a labelled line to stderr, without wrapping, so that it can be searched and copied.

    Args:
        style: rich style of the label.
        label: Word before the line, without its colon.
        text: Message.
    """
    from rich.text import Text

    err().print(Text.assemble((f"{label}: ", style), escaped(one_line(text))), soft_wrap=True)


def tell(line: str) -> None:
    """Print a line to stdout, without wrapping."""
    out().print(one_line(line), soft_wrap=True)


def write(text: str) -> None:
    """Print text that a program may read to stdout: no wrapping, and no newline at its end."""
    print(escaped(text), end="")


_OPTION_OF = {
    "resume=True": "--resume",
    "overwrite=True": "--overwrite",
    "share=(n, m)": "--share N/M",
    "run=FOLDER": "--out",
    "out=FILE": "--out",
}
"""What the core calls an argument of `kdcore.run` or `kdcore.report` -> the option for it here."""


def mistake(cause: str, cure: str) -> None:
    """Print a mistake in the user's input and its fix, with the options of the command line.

    Args:
        cause: Description of the mistake, or of several, one a line.
        cure: Instruction that fixes it, or several.
    """
    for line in with_options(cause).splitlines():
        say("bold red", "error", line)
    for line in with_options(cure).splitlines():
        say("bold green", "  fix", line)


def with_options(text: str) -> str:
    """Return a message of the core with the options of the command line in it."""
    for argument, option in _OPTION_OF.items():
        text = text.replace(argument, option)
    return text


def warn_of_problems(registry: Registry) -> None:
    """Print one warning for each plugin that failed to load."""
    for problem in registry.problems:
        say("yellow", "warning", str(problem))


def print_json(data: Any) -> None:
    """Print data as JSON: records as objects, and types that JSON does not have as strings."""
    print(escaped_json(json.dumps(data, indent=2, ensure_ascii=False, default=_plain)))


def tell_traceback() -> None:
    """Print the traceback of the exception that is being handled to stderr."""
    err().print(traceback.format_exc(), soft_wrap=True)


def _plain(value: Any) -> Any:
    record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if record else str(value)
