"""The fields of rows: their names, the words in these, and their texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PROMPTS = {
    *("prompt", "instruction", "question", "query", "problem", "input", "ask", "user"),
    *("customer", "client", "request", "message", "issue", "inquiry", "ticket", "body"),
}
"""Words of a field with a prompt."""
RESPONSES = {
    *("response", "completion", "output", "answer", "reply", "solution", "target", "chosen"),
    *("assistant", "gpt"),
}
"""Words of a field with a response."""
SIDES = {"resolution", "agent", "support", "bot"}
"""Words of a field with a response, of which others may be better: an agent's name, a support."""


def names_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """The fields of all rows; those of a table without its nulls differ."""
    return dict.fromkeys(name for row in rows for name in row)


def texts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Field -> its texts, for fields of text that are filled in at least half of the rows."""
    found = {
        n: [r[n] for r in rows if isinstance(r.get(n), str) and r[n].strip()]
        for n in names_of(rows)
    }
    return {name: texts for name, texts in found.items() if 2 * len(texts) >= len(rows)}


def words_of(name: str) -> set[str]:
    """The words of a field's name, without a plural s."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return {word.lower().removesuffix("s") for word in re.findall(r"[^\W\d_]+", apart)}
