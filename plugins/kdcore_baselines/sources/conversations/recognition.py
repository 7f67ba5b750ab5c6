"""Recognition of the fields of a file's rows, for the first spec of somebody's own data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdcore.errors import UserError
from kdcore_baselines.sources.components import ConversationParams
from kdcore_baselines.sources.conversations.rows import (
    ANSWERS,
    ConversationRows,
    grouped,
    is_answered,
)
from kdcore_baselines.sources.conversations.turn_names import is_role, names_of_turns, turns_in

SAMPLE = 200
"""Number of rows that are looked at, from the first."""
_ROLES, _ROLE = 4, 30
"""Most values of a column with roles of unknown names, and their most characters."""
_PROMPTS = {
    *("prompt", "instruction", "question", "query", "problem", "input", "ask", "user"),
    *("customer", "client", "request", "message", "issue", "inquiry", "ticket", "body"),
}
_RESPONSES = {
    *("response", "completion", "output", "answer", "reply", "solution", "resolution", "agent"),
    *("assistant", "support", "bot", "gpt", "target", "chosen"),
}
_WORSE = {"rejected", "loser"}
"""Words of a field with a response that nobody should learn."""
_EXCHANGE = (
    ("input", "prompt", "instruction", "question", "query", "user", "human"),
    ("output", "response", "completion", "answer", "assistant", "gpt"),
)
"""Fields of a prompt and its response in one item."""
_GROUPS = {
    "conversation",
    "conv",
    "ticket",
    "thread",
    "session",
    "chat",
    "case",
    "dialog",
    "dialogue",
}


def fields_of(rows: Sequence[Mapping[str, Any]], origin: str) -> dict[str, Any]:
    """Guess the params that read rows as conversations.

    Args:
        rows: Fields of the first rows.
        origin: Name of the data in messages.

    Returns:
        The params, empty if the fields have the usual names.

    Raises:
        UserError: There are no rows, or no field looks like a prompt or like turns.
    """
    if not rows:
        raise UserError(f"{origin} has no rows", "name a file with at least one row")
    if (read := _tidied(rows, {})) is not None:
        return read
    for guess in (_of_turns, _of_one_turn_per_row, _of_columns):
        if (params := guess(rows)) is not None:
            return params if (read := _tidied(rows, params)) is None else read
    raise UserError(
        f"no field of {origin} looks like a prompt or a list of turns; its fields are "
        f"{', '.join(_names(rows)) or '(none)'}",
        "name them in a spec by hand: {name: ..., path: ..., prompt: FIELD, response: FIELD}",
    )


def _tidied(rows: Sequence[Mapping[str, Any]], params: dict[str, Any]) -> dict[str, Any] | None:
    """The params, with ``tidy`` if rows lack a turn; None if no row has a response with them."""
    tidy = params | {"tidy": True}
    answered = _answered(rows, params)
    if answered and all(answered):
        return params
    return tidy if any(answered or _answered(rows, tidy)) else None


def _answered(rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> list[bool]:
    """Whether each conversation has all responses; empty if none has, or if a row is not read."""
    named = ConversationParams(**params)
    reader, placed = ConversationRows(named, ""), (("", row) for row in rows)
    read = placed if named.group is None else grouped(placed, named.group, named)
    try:
        found = [reader.read(row, "") for _, row in read]
    except UserError:
        return []
    if not any(message.role == "assistant" for each in found for message in each.messages):
        return []
    return [is_answered(each) for each in found]


def _of_turns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A field holds lists of turns."""
    for field in _names(rows):
        turns = [turn for row in rows for turn in turns_in(row.get(field))]
        names = _names(turns)
        asked, said = (next(filter(names.__contains__, each), None) for each in _EXCHANGE)
        if asked and said:
            raise UserError(
                f"the items of the field '{field}' are exchanges, with a prompt ('{asked}') and "
                f"its response ('{said}') in each, and not turns",
                f"write {field}: [{{role: user, content: ...}}, {{role: assistant, content: ...}}]",
            )
        if turns and (named := names_of_turns(turns)):
            return {"messages": field, **named}
    return None


def _of_one_turn_per_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each row is a turn: one field names the role, another the conversation."""
    texts = _texts(rows)
    known = (name for name, found in texts.items() if all(map(is_role, set(found))))
    role = next((name for name in known if len(set(texts[name])) > 1), None)
    group = _group(rows, role) if role else None
    if group is None:  # the roles have names of their own
        short = (name for name, found in texts.items() if _like_roles(found))
        pairs = ((name, _group(rows, name)) for name in short)
        role, group = next(((r, g) for r, g in pairs if g is not None), (None, None))
    if role is None or group is None:
        return None
    named = names_of_turns([{n: row.get(n) for n in texts if n != group} for row in rows], role)
    return named and {"group": group, **named}


def _like_roles(texts: Sequence[str]) -> bool:
    """Whether texts are few short values, each of them more than once."""
    values = set(texts)
    return 1 < len(values) <= min(_ROLES, len(texts) // 2) and max(map(len, values)) <= _ROLE


def _group(rows: Sequence[Mapping[str, Any]], role: str) -> str | None:
    """The field whose rows of one value are a conversation, in which several roles speak."""
    for name in sorted(_names(rows), key=lambda name: not _words(name) & _GROUPS):
        roles: dict[str, set[str]] = {}
        for row in rows:
            roles.setdefault(str(row.get(name)), set()).add(str(row.get(role)))
        several = sum(len(found) > 1 for found in roles.values())
        if name != role and 2 * several > len(roles) > 1:
            return name
    return None


def _of_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One field holds the prompt, and another one, if any, the response."""
    texts = _texts(rows)
    long = {
        n: sum(map(len, found)) / len(found) for n, found in texts.items() if len(set(found)) > 1
    }
    prose = [name for name in long if any(" " in text.strip() for text in texts[name])]
    response = _longest(long, [name for name in prose if _words(name) & _RESPONSES])
    others = [name for name in prose if name != response and not _words(name) & _WORSE]
    prompt = _longest(long, [name for name in others if _words(name) & _PROMPTS])
    if prompt is None and response is None and len(prose) > 1:  # names of another language
        longest = sorted(prose, key=lambda name: -long[name])[:2]
        prompt, response = sorted(longest, key=prose.index)
    prompt = prompt or _longest(long, others)
    if prompt is None:
        return None
    usual = prompt in ANSWERS and response is None
    return {} if usual else {"prompt": prompt} | ({"response": response} if response else {})


def _longest(long: Mapping[str, float], names: Sequence[str]) -> str | None:
    return max(names, key=lambda name: long[name], default=None)


def _names(rows: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """The fields of all rows; those of a table without its nulls differ."""
    return dict.fromkeys(name for row in rows for name in row)


def _texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Field -> its texts, for fields of text that are filled in at least half of the rows."""
    found = {
        n: [r[n] for r in rows if isinstance(r.get(n), str) and r[n].strip()] for n in _names(rows)
    }
    return {name: texts for name, texts in found.items() if 2 * len(texts) >= len(rows)}


def _words(name: str) -> set[str]:
    """The words of a field's name, without a plural s."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Za-z]+", apart)}
