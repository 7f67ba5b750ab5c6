"""Shows the sections and the field lines of docstrings as lists on the API pages.

A docstring describes arguments in Google style sections or in plain lines, ``name, other: what it
is``, whose further lines are indented. Markdown would join either into one paragraph.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_FIELD = re.compile(r"^(`?[a-z_]\w*`?(?:, `?\w+`?)*)(?: \([^)]*\))?: (?=\S)")
_SECTION = re.compile(
    r"^(Args|Attributes|Raises|Returns|Yields):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE
)


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
    text = re.sub(r"``([^`]+)``", r"`\1`", _SECTION.sub(_section, docstring))
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


def _section(found: re.Match[str]) -> str:
    """A section under its name in bold, with one item for each argument."""
    text = textwrap.dedent(found[2])
    if found[1] not in ("Returns", "Yields"):
        text = re.sub(r"(?m)^([*\w.]+): ", r"- `\1`: ", text)
    return f"**{found[1]}**\n\n{text}"
