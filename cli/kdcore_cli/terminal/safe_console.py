"""The console through which the command line prints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from kdcore_cli.terminal.control_characters import CONTROL, escaped

_PADDING = re.compile(r"[ \t]+$", re.MULTILINE)


class SafeConsole(Console):
    """A rich console that shows control characters as escapes and reads no markup in strings.

    Names, rows, answers and errors come from files, models and servers. They reach a terminal as
    `Text` or as strings, in tables too, and both pass through the two methods below.

    Args:
        stderr: Whether to write to stderr.
        file: File to write to instead.
    """

    def __init__(self, *, stderr: bool = False, file: TextIO | None = None) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, stderr=stderr, file=file)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; in a file or a pipe, lines that rich pads or wraps end without blanks."""
        if self.is_terminal or options.get("soft_wrap"):
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(_PADDING.sub("", captured.get()))

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a `Text` with escapes."""
        return super().render_str(escaped(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render an object, and the objects inside it, with escapes."""
        if isinstance(renderable, Text) and CONTROL.search(renderable.plain):
            renderable = _escaped(renderable)
        return super().render(renderable, options)


def _escaped(text: Text) -> Text:
    """Escape a text and keep its styles."""
    ends = [end for found in CONTROL.finditer(text.plain) for end in found.span()]
    whole = text.blank_copy()
    for piece in text.divide(ends):
        whole.append(Text(escaped(piece.plain), piece.style, spans=piece.spans))
    return whole
