"""Shows the docstrings' field lines as lists on the API pages.

A docstring here describes fields and arguments in plain lines, ``name, other: what it is``, whose
further lines are indented. Markdown would run them together into one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_FIELD = re.compile(r"^(`?[a-z_]\w*`?(?:, `?\w+`?)*)(?: \([^)]*\))?: (?=\S)")


class FieldLines(Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring with its field lines as items of lists, and its double marks as Markdown's."""
    lines: list[str] = []
    in_list = False
    text = re.sub(r"``([^`]+)``", r"`\1`", docstring)
    for line in re.sub(r"(?m)(?<=\w)::$", ":", text).replace("\n::\n", "\n").splitlines():
        if field := _FIELD.match(line):
            lines += [] if in_list else [""]
            lines.append(f"- **{field[1].replace('`', '')}**: {line[field.end() :]}")
            in_list = True
            continue
        if in_list and line and not line.startswith(" "):
            lines.append("")
            in_list = False
        lines.append(line)
    return "\n".join(lines)
