"""Control characters as visible escapes, so that no text from outside can steer the terminal."""

from __future__ import annotations

import re

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u2028\u2029"  # line ends that a terminal or an editor may follow
    "\u202a-\u202e\u2066-\u2069"  # the order in which characters are shown
    "\ud800-\udfff]"  # halves of characters, as in an undecodable file name
)
"""Every control character but newline and tab."""


def escaped(text: str) -> str:
    r"""Replace control characters, except newline and tab, by escapes.

    Args:
        text: Any text.

    Returns:
        The text with e.g. ``\x1b`` or ``\u202e`` written out.
    """
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def escaped_json(text: str) -> str:
    r"""Replace the control characters that JSON allows in strings by ``\uXXXX``.

    Args:
        text: JSON, whose strings hold no character below U+0020.

    Returns:
        The same JSON value.
    """
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
