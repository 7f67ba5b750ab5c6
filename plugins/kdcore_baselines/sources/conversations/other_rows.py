"""Rows that are not conversations, or hold several of which one is to be learned: refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kdcore.errors import UserError
from kdcore_baselines.sources.conversations.columns import (
    PROMPTS,
    RESPONSES,
    names_of,
    texts_of,
    words_of,
)
from kdcore_baselines.sources.conversations.turn_names import turns_in

Rows = Sequence[Mapping[str, Any]]

_LABELS = (
    *("label", "labels", "fine_label", "coarse_label", "class", "category", "sentiment"),
    *("intent", "emotion"),
)
_SIDES = (
    re.compile(r"(?i)\b(human|user|prompter)(:|\|\]|\|>)|<\|im_start\|>user|\[INST\]"),
    re.compile(r"(?i)\b(assistant|ai|gpt|bot)(:|\|\]|\|>)|<\|im_start\|>assistant|\[/INST\]"),
)
"""What stands before the turns of the two sides in a text that holds a whole conversation."""
_CHOICES = {"choice", "option", "ending"}
"""Words of a field with the answers to choose from."""
_MOST_LISTS, _DEEPEST = 3, 5
"""Most lists that a message names, and the levels of fields in which they are looked for."""
_ALIKE = re.compile(r"(.+?)(?:[_ -]?\d+|[_ -][A-Za-z]|(?<=[a-z])[A-Z])")
"""A name of one of several fields that are alike: answer_0, response2, human_ref_A, responseB."""


def refuse_choices(rows: Rows) -> None:
    """Raises UserError for questions whose answers are to be chosen from a list."""
    lists = [name for name in names_of(rows) if all(_to_choose(row, name) for row in rows)]
    found = next((name for name in lists if words_of(name) & _CHOICES), None)
    found = found or " and ".join(_several(texts_of(rows), _CHOICES))
    if found:
        raise UserError(
            f"the rows are questions with answers to choose from ({found})",
            f"write {found} into the prompt and the right one as the response: "
            '{"prompt": ..., "response": ...}',
        )


def refuse_nested(rows: Rows, origin: str) -> None:
    """Raises UserError for rows whose lists of turns stand inside other fields, as in exports."""
    found = dict.fromkeys(place for row in rows for place in _lists_within(row))
    if inside := [place for place in found if "." in place][:_MOST_LISTS]:
        raise UserError(
            f"no field of {origin} is a list of turns; it has lists inside others: "
            f"{', '.join(inside)}",
            'write a line {"messages": [{"role": "user", "content": ...}, ...]} for each '
            "conversation, as 'Exports' in the docs' page 'Your own data' does",
        )


def _lists_within(value: Any, place: str = "") -> Iterator[str]:
    """The places of the lists of mappings in a value, e.g. ``ticket.comments``."""
    if isinstance(value, Mapping) and place.count(".") < _DEEPEST:
        for name, each in value.items():
            yield from _lists_within(each, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        yield place
        if not {"role", "from"} & value[0].keys():  # a turn, whose calls and parts are its own
            yield from _lists_within(value[0], f"{place}[0]")


def refuse_alternatives(rows: Rows) -> None:
    """Raises UserError for several responses to a prompt: another field says which is better."""
    texts = texts_of(rows)
    if several := _several(texts, RESPONSES | {"ref"}):
        prompt = next((n for n in texts if n not in several and words_of(n) & PROMPTS), "FIELD")
        raise UserError(
            f"the rows have several responses to a prompt: {', '.join(several)}",
            "name the one to learn in a spec: train: {name: ..., path: ..., "
            f"prompt: {prompt}, response: {several[0]}}}",
        )
    turns = [name for name in names_of(rows) if all(turns_in(row.get(name)) for row in rows)]
    if several := _several(turns, None):
        raise UserError(
            f"the rows have several conversations: {', '.join(several)}",
            "name the one to learn in a spec: train: {name: ..., path: ..., "
            f"messages: {several[0]}}}",
        )
    for name in (name for name in turns if words_of(name) & RESPONSES):
        if all(each.keys() & RESPONSES for row in rows for each in turns_in(row.get(name))):
            raise UserError(
                f"the rows have several responses to a prompt, in '{name}'",
                'write the one to learn beside its prompt: {"prompt": ..., "response": ...}',
            )


def refuse_labelled(rows: Rows) -> None:
    """Raises UserError for rows of a classifier: texts or an image, and their label."""
    names, texts = names_of(rows), texts_of(rows)
    label = next((each for each in _LABELS if each in names), None)
    if label is None:
        return
    image = next((name for name in ("image", "img") if name in names), None)
    text = next((name for name in ("text", "sentence", "content") if name in texts), None)
    prose = [name for name, found in texts.items() if any(" " in each.strip() for each in found)]
    asked = [name for name in texts if words_of(name) & PROMPTS]
    answered = any(words_of(name) & RESPONSES for name in texts)
    numbers = label in ("label", "labels") and all(
        isinstance(r.get(label), int | float) for r in rows
    )
    if numbers and len(prose) > 1 and not answered and image is None:
        raise UserError(
            f"the rows have a label ('{label}') of several texts, and are not conversations",
            f"join {' and '.join(prose)} to one column, then write train: "
            f"{{name: labelled_dataset, path: ..., text: COLUMN, label: {label}}}",
        )
    if image is None and (text is None or asked or answered):
        return
    source, field = ("labelled_dataset", "text") if image is None else ("image_dataset", "image")
    raise UserError(
        f"the rows have a label ('{label}') and are not conversations",
        f"write train: {{name: {source}, path: ..., {field}: {image or text}, label: {label}}}",
    )


def refuse_transcripts(rows: Rows, fields: Iterable[str]) -> None:
    """Raises UserError when most texts of a field have both sides of a conversation."""
    for field in fields:
        texts = [row[field] for row in rows if isinstance(row.get(field), str)]
        if 2 * sum(all(side.search(text) for side in _SIDES) for text in texts) > len(rows):
            raise UserError(
                f"each text of the field '{field}' is a whole conversation",
                "write its turns apart: messages: [{role: user, content: ...}, ...]",
            )


def _to_choose(row: Mapping[str, Any], field: str) -> bool:
    """Whether a field has two texts or more, perhaps beside their letters, that no text repeats."""
    value = row.get(field)
    for listed in value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(listed, list) and len(listed) > 1 and all(isinstance(v, str) for v in listed):
            texts = (text for text in row.values() if isinstance(text, str))
            return not any(all(each in text for each in listed) for text in texts)
    return False


def _several(names: Iterable[str], words: set[str] | None) -> list[str]:
    """The first fields that are alike but for a number or a letter, and have one of the words."""
    names, alike = list(names), dict[str, list[str]]()
    for name in names:
        found = _ALIKE.fullmatch(name)
        if found and found[1] not in names and (words is None or words_of(found[1]) & words):
            alike.setdefault(found[1], []).append(name)
    return next((found for found in alike.values() if len(found) > 1), [])
