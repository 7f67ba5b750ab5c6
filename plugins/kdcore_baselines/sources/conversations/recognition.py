"""Recognition of the fields of a file's rows, for the first spec of somebody's own data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcore.errors import UserError
from kdcore_baselines.sources.components import ConversationParams
from kdcore_baselines.sources.conversations.columns import (
    PROMPTS,
    RESPONSES,
    SIDES,
    names_of,
    texts_of,
    words_of,
)
from kdcore_baselines.sources.conversations.other_rows import (
    refuse_alternatives,
    refuse_choices,
    refuse_labelled,
    refuse_nested,
    refuse_transcripts,
)
from kdcore_baselines.sources.conversations.rows import (
    ANSWERS,
    TURNS,
    ConversationRows,
    is_answered,
)
from kdcore_baselines.sources.conversations.selection import grouped
from kdcore_baselines.sources.conversations.tidying import UNANSWERED
from kdcore_baselines.sources.conversations.turn_names import (
    exchanged,
    is_role,
    names_of_turns,
    roles_of,
    roles_said,
    turns_in,
)

SAMPLE = 200
"""Number of rows that decide what the fields mean, from the first."""
_ROLES, _ROLE = 4, 30
"""Most values of a column with roles of unknown names, and their most characters."""
_DATE = 4
"""Fewest digits of a date, which a role does not have."""
_SAID = {"data", "turn", "utterance", "dialog", "dialogue", "chat", "conversation", "message"}
"""Words of a field with the texts of both sides in turn."""
_WORSE = {"rejected", "loser"}
"""Words of a field with a response that nobody should learn."""
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


def fields_of(every: Iterable[Mapping[str, Any]], origin: str) -> dict[str, Any]:
    """Guess the params that read rows as conversations.

    The first rows decide; the others may add roles, and `tidy` if one lacks a turn.

    Args:
        every: Fields of all rows.
        origin: Name of the data in messages.

    Returns:
        The params, empty if the fields have the usual names.

    Raises:
        UserError: There are no rows, or no field looks like a prompt or like turns.
    """
    rows = (every := list(every))[:SAMPLE]
    if not rows:
        raise UserError(f"{origin} has no rows", "name a file with at least one row")
    refuse_choices(rows)
    found, names = _guessed(rows, origin), names_of(rows)
    if "messages" not in found and not names.keys() & {*TURNS}:
        usual = next((name for name in ANSWERS if name in names), "prompt")
        prompt = found.get("prompt", found.get("text", usual))
        refuse_transcripts(rows, [prompt, found.get("response", ""), *ANSWERS.get(prompt, ())])
    return _for_all(every, found)


def _guessed(rows: Sequence[Mapping[str, Any]], origin: str) -> dict[str, Any]:
    """The params, by the first guess that reads the rows."""
    if (read := _tidied(rows, {})) is not None:
        return read
    refuse_alternatives(rows)
    for guess in (_of_turns, _of_known_roles, _of_named_columns, _of_own_roles, _of_columns):
        if (params := guess(rows)) is not None:
            return params if (read := _tidied(rows, params)) is None else read
    refuse_transcripts(rows, names_of(rows))
    refuse_nested(rows, origin)
    if names_of(rows).keys() & {*TURNS}:  # the reader says what is wrong with them
        usual = ConversationParams.model_validate({})
        ConversationRows(usual, "chat").read(rows[0], f"{origin}:1")
    raise UserError(
        f"no field of {origin} looks like a prompt or a list of turns; its fields are "
        f"{', '.join(names_of(rows)) or '(none)'}",
        "name them in a spec by hand: {name: ..., path: ..., prompt: FIELD, response: FIELD}, or "
        'write rows with messages: [{"role": "user", "content": ...}, ...]',
    )


def _for_all(every: Sequence[Mapping[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    """The params of the first rows, for all rows."""
    if "role" in params and (roles := _later_roles(every, params) | params.get("roles", {})):
        params = params | {"roles": roles}
    tidied = _tidied(every, params)  # without one, reading the rows tells what is wrong
    return params if tidied is None else tidied


def _later_roles(every: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> dict[str, str]:
    """The meaning of all roles; one that begins most of its conversations is a user's."""
    talks: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(every):
        own = [row] if "group" in params else turns_in(row.get(params.get("messages", "")))
        name = row.get(params["group"]) if "group" in params else number
        talks.setdefault(str(name), []).extend(own)
    spoken = [roles_said(turns, params["role"], params["content"]) for turns in talks.values()]
    found = roles_of(list(dict.fromkeys(name for names in spoken for name in names)))
    for name in found.keys() - params.get("roles", {}).keys():
        where = [names.index(name) for names in spoken if name in names]
        if not is_role(name) and 2 * where.count(0) > len(where):
            found[name] = "user"
    return found


def _tidied(rows: Sequence[Mapping[str, Any]], params: dict[str, Any]) -> dict[str, Any] | None:
    """The params, with ``tidy`` if rows lack a turn; None if no row has a response with them."""
    tidy = params | {"tidy": True}
    answered = _answered(rows, params)
    if answered and all(answered):
        return params
    # where each conversation ends in a user turn, that turn is the prompt; texts have no turns
    joined = [] if "text" in params else _answered(rows, tidy, to_the_end=bool(answered))
    return tidy if any(answered) or any(joined) else None


def _answered(
    rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any], *, to_the_end: bool = False
) -> list[bool]:
    """Whether each conversation has all responses; empty if none has, or if a row is not read.

    ``to_the_end``: whether one counts as unanswered that loses its last user turns to ``tidy``.
    """
    named = ConversationParams(**params)
    reader, placed = ConversationRows(named, ""), (("", row) for row in rows)
    read = placed if named.group is None else grouped(placed, named.group, named)
    try:
        found = [reader.read(row, "") for _, row in read]
    except UserError:
        return []
    if not any(message.role == "assistant" for each in found for message in each.messages):
        return []
    lost = UNANSWERED if to_the_end else None
    return [is_answered(each) and lost not in each.notes for each in found]


def _of_turns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A field holds lists of turns."""
    for field in names_of(rows):
        if field == "turns" and _are_texts(rows, field):  # prompts, as in MT-Bench
            return {}
        turns = [turn for row in rows for turn in turns_in(row.get(field))]
        if exchanged(turns) or (words_of(field) & _SAID and _are_texts(rows, field)):
            return {"messages": field}
        named = names_of_turns(turns) if turns else None
        if named is None or not _speak(turns, named["role"]):
            continue
        params = {"messages": field, **named}
        responses = [] if _answered(rows, params) else _answering(rows, field)
        return {"prompt": field, "response": responses[0]} if len(responses) == 1 else params
    return None


def _are_texts(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    """Whether a field has lists of texts, of which two or more are in each."""
    return all(
        isinstance(texts := row.get(field), list)
        and len(texts) > 1
        and all(isinstance(text, str) for text in texts)
        for row in rows
    )


def _speak(turns: Sequence[Mapping[str, Any]], role: str) -> bool:
    """Whether a field of turns names roles: known ones, or few short ones."""
    values = [str(turn[role]) for turn in turns if turn.get(role) is not None]
    return all(map(is_role, values)) or _like_roles(values)


def _answering(rows: Sequence[Mapping[str, Any]], asked: str) -> list[str]:
    """The fields with the responses to prompts that are turns."""
    return [
        name
        for name in names_of(rows)
        if name != asked
        and words_of(name) & (RESPONSES | SIDES)
        and all(isinstance(row.get(name), str) or turns_in(row.get(name)) for row in rows)
    ]


def _of_known_roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each row is a turn: one field names the role, another the conversation."""
    found = {name: set(texts) for name, texts in texts_of(rows).items()}
    known = (name for name, roles in found.items() if len(roles) > 1 and all(map(is_role, roles)))
    role = next(known, None)
    return _of_one_turn_per_row(rows, role, _group(rows, role)) if role else None


def _of_own_roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each row is a turn, and the roles have names of their own."""
    for role, texts in texts_of(rows).items():
        if _like_roles(texts) and (group := _group(rows, role)) is not None:
            return _of_one_turn_per_row(rows, role, group)
    return None


def _of_one_turn_per_row(
    rows: Sequence[Mapping[str, Any]], role: str, group: str | None
) -> dict[str, Any] | None:
    if group is None:
        return None
    texts = texts_of(rows)
    named = names_of_turns([{n: row.get(n) for n in texts if n != group} for row in rows], role)
    return named and {"group": group, **named}


def _like_roles(texts: Sequence[str]) -> bool:
    """Whether texts are few short values, each of them more than once, and no dates."""
    values = set(texts)
    if any(sum(map(str.isdigit, value)) >= _DATE for value in values):
        return False
    return 1 < len(values) <= min(_ROLES, len(texts) // 2) and max(map(len, values)) <= _ROLE


def _group(rows: Sequence[Mapping[str, Any]], role: str) -> str | None:
    """The field whose rows of one value are a conversation, in which several roles speak."""
    for name in sorted(names_of(rows), key=lambda name: not words_of(name) & _GROUPS):
        said = [value for row in rows if isinstance(value := row.get(name), str)]
        if 2 * sum(" " in value and len(value) > _ROLE for value in said) > len(rows):  # prose
            continue
        roles: dict[str, set[str]] = {}
        for row in rows:
            roles.setdefault(str(row.get(name)), set()).add(str(row.get(role)))
        several = sum(len(found) > 1 for found in roles.values())
        if name != role and 2 * several > len(roles) > 1:
            return name
    return None


def _of_named_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Two fields hold prompt and response, by their names and by their many long texts.

    A column of two values, such as whether a ticket is closed, would else look like roles.
    """
    params, texts = _of_columns(rows) or {}, texts_of(rows)
    for side, known in (("prompt", PROMPTS), ("response", RESPONSES | SIDES)):
        found = texts.get(name := params.get(side, ""), [])
        named = bool(words_of(name) & known) and len(set(found)) > _ROLES
        if not named or sum(map(len, found)) <= _ROLE * len(found):  # e.g. the agent's name
            return None
    return params


def _of_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One field holds the prompt, and another one, if any, the response."""
    texts = texts_of(rows)
    refuse_labelled(rows)
    long = {
        n: sum(map(len, found)) / len(found) for n, found in texts.items() if len(set(found)) > 1
    }
    prose = [name for name in long if any(" " in text.strip() for text in texts[name])]
    named = [[name for name in prose if words_of(name) & words] for words in (RESPONSES, SIDES)]
    response = _longest(long, named[0] or named[1])
    others = [name for name in prose if name != response and not words_of(name) & _WORSE]
    prompt = _longest(long, [name for name in others if words_of(name) & PROMPTS])
    if prompt is None and response is None and len(prose) > 1:  # names of another language
        longest = sorted(prose, key=lambda name: -long[name])[:2]
        prompt, response = sorted(longest, key=prose.index)
    prompt = prompt or _longest(long, others)
    if prompt is None:
        return None
    if prompt in ("text", "content") and response is None:  # a corpus
        return {"text": prompt}
    usual = prompt in ANSWERS and response is None
    return {} if usual else {"prompt": prompt} | ({"response": response} if response else {})


def _longest(long: Mapping[str, float], names: Sequence[str]) -> str | None:
    return max(names, key=lambda name: long[name], default=None)
