"""Recognition of the fields of a file's rows, for the first spec of somebody's own data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcore.errors import UserError
from kdcore_baselines.sources.components import ConversationParams
from kdcore_baselines.sources.conversations.rows import (
    ANSWERS,
    TURNS,
    ConversationRows,
    is_answered,
)
from kdcore_baselines.sources.conversations.selection import grouped
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
_PROMPTS = {
    *("prompt", "instruction", "question", "query", "problem", "input", "ask", "user"),
    *("customer", "client", "request", "message", "issue", "inquiry", "ticket", "body"),
}
_RESPONSES = {
    *("response", "completion", "output", "answer", "reply", "solution", "resolution", "agent"),
    *("assistant", "support", "bot", "gpt", "target", "chosen"),
}
_SAID = {"data", "turn", "utterance", "dialog", "dialogue", "chat", "conversation", "message"}
"""Words of a field with the texts of both sides in turn."""
_WORSE = {"rejected", "loser"}
"""Words of a field with a response that nobody should learn."""
_LABELS = ("label", "labels", "fine_label", "coarse_label", "class", "category", "sentiment")
_SIDES = (
    re.compile(r"(?i)\b(human|user|prompter)(:|\|\]|\|>)|<\|im_start\|>user|\[INST\]"),
    re.compile(r"(?i)\b(assistant|ai|gpt|bot)(:|\|\]|\|>)|<\|im_start\|>assistant|\[/INST\]"),
)
"""What stands before the turns of the two sides in a text that holds a whole conversation."""
_CHOICES = {"choice", "option", "ending"}
"""Words of a field with the answers to choose from."""
_NUMBERED = re.compile(r"(.+?)(?:[_ -]?\d+|[_ -][A-Za-z]|(?<=[a-z])[A-Z])")
"""A name of one of several fields that are alike: answer_0, response2, human_ref_A, responseB."""
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
    _refuse_choices(rows)
    found, names = _guessed(rows, origin), _names(rows)
    if "messages" not in found and not names.keys() & {*TURNS}:
        usual = next((name for name in ANSWERS if name in names), "prompt")
        prompt = found.get("prompt", found.get("text", usual))
        _refuse_transcripts(rows, [prompt, found.get("response", ""), *ANSWERS.get(prompt, ())])
    return _for_all(every, found)


def _guessed(rows: Sequence[Mapping[str, Any]], origin: str) -> dict[str, Any]:
    """The params, by the first guess that reads the rows."""
    if (read := _tidied(rows, {})) is not None:
        return read
    for guess in (_of_turns, _of_known_roles, _of_named_columns, _of_own_roles, _of_columns):
        if (params := guess(rows)) is not None:
            return params if (read := _tidied(rows, params)) is None else read
    _refuse_transcripts(rows, _names(rows))
    if _names(rows).keys() & {*TURNS}:  # the reader says what is wrong with them
        usual = ConversationParams.model_validate({})
        ConversationRows(usual, "chat").read(rows[0], f"{origin}:1")
    raise UserError(
        f"no field of {origin} looks like a prompt or a list of turns; its fields are "
        f"{', '.join(_names(rows)) or '(none)'}",
        "name them in a spec by hand: {name: ..., path: ..., prompt: FIELD, response: FIELD}",
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
        if exchanged(turns) or (_words(field) & _SAID and _are_texts(rows, field)):
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
        for name in _names(rows)
        if name != asked
        and _words(name) & _RESPONSES
        and all(isinstance(row.get(name), str) or turns_in(row.get(name)) for row in rows)
    ]


def _of_known_roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each row is a turn: one field names the role, another the conversation."""
    found = {name: set(texts) for name, texts in _texts(rows).items()}
    known = (name for name, roles in found.items() if len(roles) > 1 and all(map(is_role, roles)))
    role = next(known, None)
    return _of_one_turn_per_row(rows, role, _group(rows, role)) if role else None


def _of_own_roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each row is a turn, and the roles have names of their own."""
    for role, texts in _texts(rows).items():
        if _like_roles(texts) and (group := _group(rows, role)) is not None:
            return _of_one_turn_per_row(rows, role, group)
    return None


def _of_one_turn_per_row(
    rows: Sequence[Mapping[str, Any]], role: str, group: str | None
) -> dict[str, Any] | None:
    if group is None:
        return None
    texts = _texts(rows)
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


def _of_named_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Two fields hold prompt and response, by their names and by their many long texts.

    A column of two values, such as whether a ticket is closed, would else look like roles.
    """
    params, texts = _of_columns(rows) or {}, _texts(rows)
    for side, known in (("prompt", _PROMPTS), ("response", _RESPONSES)):
        found = texts.get(name := params.get(side, ""), [])
        named = bool(_words(name) & known) and len(set(found)) > _ROLES
        if not named or sum(map(len, found)) <= _ROLE * len(found):  # e.g. the agent's name
            return None
    return params


def _of_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One field holds the prompt, and another one, if any, the response."""
    texts = _texts(rows)
    _refuse_alternatives(texts)
    _refuse_labelled(rows, texts)
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
    if prompt == "text" and response is None:  # a corpus
        return {"text": prompt}
    usual = prompt in ANSWERS and response is None
    return {} if usual else {"prompt": prompt} | ({"response": response} if response else {})


def _refuse_choices(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for questions whose answers are to be chosen from a list."""
    for field in _names(rows):
        if _words(field) & _CHOICES and all(_are_choices(row.get(field)) for row in rows):
            raise UserError(
                f"the rows are questions with answers to choose from ('{field}')",
                f"write the {field} into the prompt and the right one as the response: "
                '{"prompt": ..., "response": ...}',
            )


def _are_choices(value: Any) -> bool:
    """Whether a field has two texts or more, perhaps beside their letters."""
    if isinstance(value, Mapping):
        return any(_are_choices(each) for each in value.values())
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


def _refuse_alternatives(texts: Mapping[str, Any]) -> None:
    """Raises UserError for several responses to a prompt: another field says which is better."""
    alike: dict[str, list[str]] = {}
    for name in texts:
        found = _NUMBERED.fullmatch(name)
        if found and _words(found[1]) & (_RESPONSES | {"ref"}) and found[1] not in texts:
            alike.setdefault(found[1], []).append(name)
    several = next((names for names in alike.values() if len(names) > 1), None)
    if several is None:
        return
    prompt = next((n for n in texts if n not in several and _words(n) & _PROMPTS), "FIELD")
    raise UserError(
        f"the rows have several responses to a prompt: {', '.join(several)}",
        "name the one to learn in a spec: train: {name: ..., path: ..., "
        f"prompt: {prompt}, response: {several[0]}}}",
    )


def _refuse_labelled(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Any]) -> None:
    """Raises UserError for rows of a classifier: a text or an image, and its label."""
    names = _names(rows)
    label = next((each for each in _LABELS if each in names), None)
    image = next((name for name in ("image", "img") if name in names), None)
    text = next((name for name in ("text", "sentence", "content") if name in texts), None)
    asks = any(_words(name) & _PROMPTS for name in texts)
    numbers = label in ("label", "labels") and all(isinstance(r.get(label), int) for r in rows)
    if (
        label is not None
        and numbers
        and not asks
        and image is None
        and text is None
        and len(texts) > 1
    ):
        raise UserError(
            f"the rows have a label ('{label}') of several texts, and are not conversations",
            f"join {' and '.join(texts)} to one column, then write train: "
            f"{{name: labelled_dataset, path: ..., text: COLUMN, label: {label}}}",
        )
    if label is None or (image is None and (text is None or asks)):
        return
    source, field = ("labelled_dataset", "text") if image is None else ("image_dataset", "image")
    raise UserError(
        f"the rows have a label ('{label}') and are not conversations",
        f"write train: {{name: {source}, path: ..., {field}: {image or text}, label: {label}}}",
    )


def _refuse_transcripts(rows: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> None:
    """Raises UserError when most texts of a field have both sides of a conversation."""
    for field in fields:
        texts = [row[field] for row in rows if isinstance(row.get(field), str)]
        if 2 * sum(all(side.search(text) for side in _SIDES) for text in texts) > len(rows):
            raise UserError(
                f"each text of the field '{field}' is a whole conversation",
                "write its turns apart: messages: [{role: user, content: ...}, ...]",
            )


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
