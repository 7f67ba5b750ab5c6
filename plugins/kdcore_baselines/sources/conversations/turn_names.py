"""Names that data sets give to the fields and roles of turns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

KNOWN = {"system", "developer", "user", "assistant", "tool", "ipython"}
ROLES = {
    "human": "user",
    "customer": "user",
    "client": "user",
    "prompter": "user",
    "requester": "user",
    "visitor": "user",
    "inbound": "user",
    "guest": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "agent": "assistant",
    "support": "assistant",
    "operator": "assistant",
    "outbound": "assistant",
    "staff": "assistant",
    **dict.fromkeys(("kunde", "kundin", "cliente", "klant"), "user"),
    **dict.fromkeys(("mitarbeiter", "mitarbeiterin", "agente", "medewerker"), "assistant"),
    "assistant": "assistant",
    "user": "user",
    "system": "system",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles of data sets that name the role of a turn ``from``; for others they are suggestions."""
_ROLE_FIELDS = ("role", "from", "speaker", "author", "sender", "sender_type", "user", "who")
SHAREGPT = (
    *("human", "gpt", "chatgpt"),
    *("function_call", "function", "observation", "function_response"),
)
_EXCHANGE = (
    ("input", "prompt", "instruction", "question", "query", "user", "human"),
    ("output", "response", "completion", "answer", "assistant", "gpt"),
)
"""Fields of a prompt and its response in one item."""


def filled_in(row: Mapping[str, Any], source: str) -> str | None:
    """The cure for a row with turns under another name; None if no field holds turns."""
    for field, value in row.items():
        if turns := turns_in(value):
            return line_of(field, turns, source)
    return None


def turns_in(value: Any) -> list[dict[str, Any]]:
    """A field's turns.

    Args:
        value: Value of a field: a list of mappings, or its JSON text.

    Returns:
        The turns; an empty list if the field holds something else.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return value
    return []


def exchanged(turns: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Read items that are exchanges, with a prompt and its response in each.

    Args:
        turns: Items of a list.

    Returns:
        The prompts and responses; an empty list if the items are something else, or more.
    """
    items = [turn for turn in turns if isinstance(turn, Mapping)]
    fields = {name for item in items for name in item}
    asked, said = (next(filter(fields.__contains__, each), None) for each in _EXCHANGE)
    if len(items) < len(turns) or fields != {asked, said}:
        return []
    return [(item.get(asked), item.get(said)) for item in items]


def line_of(field: str, turns: Sequence[Mapping[str, Any]], source: str) -> str | None:
    """The params that read turns under other names, filled in; None if their fields are unclear."""
    if (named := names_of_turns(turns)) is None:
        return None
    params = {"name": source, "messages": field, **named}
    line = yaml.safe_dump(
        params, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
    )
    return f"write {line.strip()}"


def names_of_turns(
    turns: Sequence[Mapping[str, Any]], role: str | None = None
) -> dict[str, Any] | None:
    """Guess which fields of turns are the role and the text, and what the roles mean.

    Args:
        turns: Turns of one or several conversations, in order.
        role: Name of the field with the role, if it is known.

    Returns:
        The params role, content and, if a role has another name than in chat templates, roles;
        None if the turns have less than two fields of text.
    """
    texts = {
        name: [str(turn[name]) for turn in turns if isinstance(turn.get(name), str)]
        for name in dict.fromkeys(name for turn in turns for name in turn)
    }
    texts = {name: found for name, found in texts.items() if any(found)}
    if len(texts) < 2:
        return None
    role = role or next(
        (name for name in _ROLE_FIELDS if name in texts),
        min(texts, key=lambda name: _unlike_a_role(texts[name])),
    )
    others = [name for name in texts if name != role]
    content = max(others, key=lambda name: sum(map(str.isalpha, "".join(texts[name]))))  # no times
    roles = roles_of(roles_said(turns, role, content) or list(dict.fromkeys(texts[role])))
    return {"role": role, "content": content} | ({"roles": roles} if roles else {})


def _unlike_a_role(texts: Sequence[str]) -> tuple[bool, int, int]:
    """Sort key of a field: roles have at least two values, few of them, and short ones."""
    values = len(set(texts))
    return values < 2, values, sum(map(len, texts))


def is_role(text: str) -> bool:
    """Whether a text is a name of a role that data sets use."""
    return text.lower() in ROLES


def roles_said(turns: Sequence[Mapping[str, Any]], role: str, content: str) -> list[str]:
    """The roles of the turns that say something, in the order of their first ones.

    Args:
        turns: Turns.
        role: Name of the field with the role.
        content: Name of the field with the text.

    Returns:
        The roles, each once.
    """
    said = (
        turn.get(role)
        for turn in turns
        if isinstance(text := turn.get(content), list) or str(text or "").strip()
    )
    return list(dict.fromkeys(each for each in said if isinstance(each, str)))


def roles_of(seen: Sequence[str]) -> dict[str, str]:
    """The meaning of roles, but of those of chat templates.

    Args:
        seen: Roles in the order of their first turns.

    Returns:
        Role in the data -> role of the chat template.
    """
    meant = {name: name if name in KNOWN else ROLES.get(name.lower(), "") for name in seen}
    for name in (name for name in seen if not meant[name]):
        meant[name] = "assistant" if "user" in meant.values() else "user"
    return {name: role for name, role in meant.items() if name not in KNOWN}
