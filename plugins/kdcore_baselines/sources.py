"""Data sources: conversations from a .jsonl file, labelled texts from a .csv file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdcore import BuildContext, Row
from kdcore.data.conversation import Conversation, Message
from kdcore.data.template_mask import encode
from kdcore.errors import UserError, nearest
from kdcore_baselines.source_components import ChatParams, LabelledTextParams, SeveralParams
from kdcore_baselines.stratified import stratified

T = TypeVar("T")
_PAIRS = {"prompt": "response", "instruction": "output", "question": "answer"}
"""Field of the response by the field of its prompt."""


class ChatSource:
    """Source of conversations, one JSON object per line, whose fields determine its format."""

    def __init__(self, params: ChatParams, context: BuildContext) -> None:
        self.params = params

    def read(self) -> list[Conversation]:
        found: dict[str, Conversation] = {}
        for place, row in islice(_json_lines(self.params.path), self.params.limit):
            conversation = self._conversation(row, place)
            if conversation.id in found:
                raise UserError(
                    f"{place}: the id '{conversation.id}' already exists",
                    "give each row a unique id, or no id",
                )
            found[conversation.id] = conversation
        return _some(list(found.values()), self.params.path)

    def encode(self, example: Conversation, tokenizer: Any, max_length: int) -> Row:
        return encode(example, tokenizer, max_length)

    def _conversation(self, row: Mapping[str, Any], place: str) -> Conversation:
        messages = self._messages(row, place)
        if not any(message.role == "user" for message in messages):
            raise UserError(f"{place} has no user turn", "add a prompt, or remove the line")
        if self.params.system is not None and messages[0].role != "system":
            messages = [Message("system", self.params.system), *messages]
        plain = self.params.template == "none"
        named = row.get("id")
        return Conversation(place if named is None else str(named), tuple(messages), plain)

    def _messages(self, row: Mapping[str, Any], place: str) -> list[Message]:
        """Read the turns of a row in any of the formats."""
        if self.params.prompt is None and "messages" in row:
            return [_message(turn, place) for turn in _list(row["messages"], "messages", place)]
        if self.params.prompt is None and "turns" in row:
            asked = _list(row["turns"], "turns", place)
            answers = _list(row.get("reference") or [], "reference", place)[: len(asked)]
            pairs = zip_longest(asked, answers)
            return [m for turn, answer in pairs for m in _exchange(turn, answer, place)]
        prompt = self.params.prompt or next((field for field in _PAIRS if field in row), "prompt")
        if prompt not in row:
            raise UserError(
                f"{place} has no prompt; its fields are {', '.join(row) or '(none)'}",
                f"use messages, turns, {', '.join(_PAIRS)}, or name the field: {{prompt: ...}}",
            )
        # Self-Instruct's seed tasks keep input and output in a list of instances
        instances = _list(row.get("instances") or [{}], "instances", place)
        row = {**row, **instances[0]}
        text = row[prompt]
        if prompt == "instruction" and row.get("input"):
            text = f"{text}\n\n{row['input']}"
        response = self.params.response or _PAIRS.get(prompt, "response")
        return _exchange(text, row.get(response), place)


@dataclass(frozen=True, slots=True)
class LabelledText:
    """Text with its class.

    Attributes:
        id: Name of the row in messages.
        text: The text.
        label: Index of the class.
    """

    id: str
    text: str
    label: int


class LabelledTextSource:
    """Source of labelled texts, one per line; its ``classes`` are the labels, sorted."""

    model_class = "AutoModelForSequenceClassification"

    def __init__(self, params: LabelledTextParams, context: BuildContext) -> None:
        self.params = params
        self._labels = params.classes_from or params.path
        self.classes = sorted({label for _, _, label in self._rows(self._labels)})

    def read(self) -> list[LabelledText]:
        place_of = {label: place for place, label in enumerate(self.classes)}
        every, rows = list(self._rows(self.params.path)), []
        chosen = stratified([label for _, _, label in every], *self.params.part)
        for place, text, label in (every[i] for i in chosen[: self.params.limit]):
            if label not in place_of:
                raise UserError(
                    f"{place}: unknown label '{label}'; it does not occur in {self._labels}",
                    nearest(label, self.classes),
                )
            rows.append(LabelledText(place, text, place_of[label]))
        return _some(rows, self.params.path)

    def encode(self, example: LabelledText, tokenizer: Any, max_length: int) -> Row:
        encoded = tokenizer(example.text, truncation=True, max_length=max_length)
        return Row(
            inputs={name: torch.tensor(values) for name, values in encoded.items()},
            labels=torch.tensor([example.label]),
            mask=torch.tensor([True]),
            id=example.id,
        )

    def _rows(self, path: Path) -> Iterator[tuple[str, str, str]]:
        """Yield place, text and label of each row."""
        columns = (self.params.text, self.params.label)
        reader = csv.DictReader(io.StringIO(_text(path)))
        try:
            for column in columns:
                if column not in (reader.fieldnames or ()):
                    raise UserError(
                        f"{path} has no column '{column}'", nearest(column, reader.fieldnames or ())
                    )
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                text, label = (row[column] for column in columns)
                if not text or not label:
                    raise UserError(f"{place} has no text or no label", "fix or remove the line")
                yield place, text, label
        except csv.Error as fault:
            raise UserError(
                f"{path.name}:{reader.line_num}: {fault}",
                "look for an unclosed quotation mark",
            ) from fault


class SeveralSources:
    """Source that concatenates the rows of several sources.

    If an id occurs twice, the later row's id gets the number of its source as a suffix.
    """

    def __init__(self, params: SeveralParams, context: BuildContext) -> None:
        sources: list[Any] = [context.build(choice) for choice in params.sources]
        self.sources = sources
        kinds = {(type(s), getattr(s, "model_class", None)) for s in sources}
        labels = {tuple(getattr(s, "classes", ())) for s in sources}
        if len(kinds) > 1 or len(labels) > 1:
            raise UserError(
                "source 'several' joins sources with different kinds of rows or different classes",
                "join sources of one name, and set the same classes_from on labelled texts",
            )
        for name in ("model_class", "classes"):
            if hasattr(sources[0], name):
                setattr(self, name, getattr(sources[0], name))

    def read(self) -> list[Any]:
        found: dict[str, Any] = {}
        for number, source in enumerate(self.sources, start=1):
            for example in source.read():
                name = example.id if example.id not in found else f"{example.id}#{number}"
                found[name] = replace(example, id=name)
        return list(found.values())

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        row: Row = self.sources[0].encode(example, tokenizer, max_length)
        return row


def _some(rows: list[T], path: Path) -> list[T]:
    if not rows:
        raise UserError(f"{path} has no rows", "name a file with at least one row")
    return rows


def _exchange(prompt: Any, response: Any, place: str) -> list[Message]:
    """Return a user turn, and an assistant turn if the response is not blank."""
    if not isinstance(prompt, str):
        raise UserError(f"{place}: the prompt must be a string, not {prompt!r}", "put it in quotes")
    if not prompt.strip():
        raise UserError(f"{place}: the prompt is blank", "write a prompt, or remove the row")
    if not isinstance(response, str | None):
        raise UserError(f"{place}: the response must be a string", "write a string")
    if response is None or not response.strip():
        return [Message("user", prompt)]
    return [Message("user", prompt), Message("assistant", response)]


def _message(turn: Any, place: str) -> Message:
    try:
        role, content = turn["role"], turn["content"]
        ended = turn.get("ended", True)
        if not (isinstance(role, str) and isinstance(content, str) and isinstance(ended, bool)):
            raise TypeError
        return Message(role, content, ended)
    except (TypeError, KeyError):
        raise UserError(
            f"{place}: a message must be {{role, content}} with two strings",
            'write {"role": "user", "content": "..."}; ended, if set, must be true or false',
        ) from None


def _list(value: Any, field: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place}: '{field}' must be a list", "write it in square brackets")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and object of each line that is not blank."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        place = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            raise UserError(
                f"{place} is not valid JSON: {fault.msg} at column {fault.colno}",
                "write one JSON object per line",
            ) from fault
        except (ValueError, RecursionError) as fault:
            raise UserError(
                f"{place} has a number with thousands of digits, or thousands of nested brackets",
                "write one JSON object per line",
            ) from fault
        if not isinstance(row, dict):
            raise UserError(
                f"{place} must be a JSON object, not a {type(row).__name__}",
                "write one JSON object per line",
            )
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UserError(
                f"{place} contains an incomplete surrogate pair", "fix its \\uD... escapes"
            )
        yield place, row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(
            f"{path} cannot be read: {fault.strerror}",
            "check the path, which is relative to the spec's folder (for an option, to the working "
            "directory)",
        ) from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8: {fault.reason}", "save it as UTF-8") from fault
