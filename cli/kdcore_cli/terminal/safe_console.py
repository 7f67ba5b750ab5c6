"""The console through which the command line prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from kdcore_cli.terminal.control_characters import CONTROL, escaped

_PADDING = re.compile(r"[ \t]+$", re.MULTILINE)
LONGEST = 16
"""Characters of a word that a table keeps together; longer ones, such as paths, may break."""
_UNLIMITED = 100_000
"""Columns of a terminal in which each table fits."""


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
        """Print objects; in a file or a pipe, lines that rich pads or wraps end without blanks.

        A table whose words do not fit is printed as lines.
        """
        objects = tuple(self._fitted(each) if isinstance(each, Table) else each for each in objects)
        if self.is_terminal or options.get("soft_wrap"):
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(_PADDING.sub("", captured.get()))

    def on_broken_pipe(self) -> None:
        """Leave the error, which rich handles when it calls this, to the command line."""
        raise

    def _fitted(self, table: Table) -> RenderableType:
        """The table with columns that do not break words, or as lines if these do not fit."""
        unlimited = self.options.update(max_width=_UNLIMITED)
        if self.measure(table, options=unlimited).maximum <= self.width:
            return table
        rows = [
            [_text(each) for each in row]
            for row in zip(*(c.cells for c in table.columns), strict=True)
        ]
        gaps = sum(table.padding[1] for _ in table.columns[1:])
        least, widths = [], []
        for place, column in enumerate(table.columns):
            cells = [_text(column.header), *(row[place] for row in rows)]
            words = [word for cell in cells for word in cell.plain.split()]
            longest = min(LONGEST, max(map(len, words), default=1))
            least.append(max(column.min_width or 0, longest))
            widths.append(min(self.width, max(cell.cell_len for cell in cells)))
        if sum(least) + gaps > self.width:
            return _lines(table, rows)
        while sum(widths) + gaps > self.width:
            room = [width - needed for width, needed in zip(widths, least, strict=True)]
            widths[room.index(max(room))] -= 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
        return table

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


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(escaped(str(cell)))


def _lines(table: Table, rows: Iterable[Sequence[Text]]) -> Group:
    """The first cell of each row, and below it the others that are not blank, by their headings."""
    lines: list[RenderableType] = []
    for first, *others in rows:
        beginning = bool(first.plain.strip())
        lines += [first] if beginning else []
        for column, cell in zip(table.columns[1:], others, strict=True):
            heading = _text(column.header).plain.strip() if table.show_header else ""
            line = Text.assemble((f"{heading}: ", "bold"), cell) if heading else cell
            if cell.plain.strip():
                lines.append(Padding(line, (0, 0, 0, 2 if beginning else 0)))
    return Group(*lines)


def _escaped(text: Text) -> Text:
    """Escape a text and keep its styles."""
    ends = [end for found in CONTROL.finditer(text.plain) for end in found.span()]
    whole = text.blank_copy()
    for piece in text.divide(ends):
        whole.append(Text(escaped(piece.plain), piece.style, spans=piece.spans))
    return whole
