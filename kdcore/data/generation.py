"""Responses that a teacher generates, once, into a file that a killed run takes up again.

The file has one conversation a line, as the chat source reads them; beside it a manifest says
what the responses depend on. Batches are planned from the prompts alone and taken up whole, so
that a resumed run generates what the unbroken one would have.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError
from kdcore.progress import Progress

Numbered: TypeAlias = tuple[int, Sequence[Conversation]]
"""A batch and its number in the plan."""


class Answerer(Protocol):
    """Who gives the responses: a model here (`ModelAnswers`), or one behind an endpoint."""

    name: str
    settings: Mapping[str, Any]
    """What the responses depend on, for the manifest; plain data, no secret."""
    why_not: str
    """Why a conversation may be left without its responses, in words."""

    def plan(self, asked: Sequence[Conversation]) -> Sequence[Sequence[Conversation]]:
        """Batches of the conversations it can answer."""

    def answers(self, batches: Sequence[Numbered]) -> Iterator[tuple[list[Conversation], int]]:
        """The batches answered, in any order: conversations, and the tokens generated for them.

        A conversation may be missing. Raises UserError for what the user can mend.
        """


@dataclass(frozen=True, slots=True)
class Responses:
    """What `respond` gives.

    conversations: in the order asked, with every response. tokens, seconds: what generating took
    this time; what the file held already is not counted.
    """

    conversations: list[Conversation]
    tokens: int
    seconds: float


def respond(
    conversations: Sequence[Conversation], answerer: Answerer, path: Path, progress: Progress
) -> Responses:
    """The conversations with every response the answerer's own.

    Responses they had are replaced. One that reaches ``max_new_tokens`` has no end token and is
    not `Message.ended`. A conversation that gets no answer is left out, with a note.

    path: the JSONL file, in the end in the conversations' order; what it holds is kept, except a
    line or a batch that was cut short.
    Raises UserError when that was made by another teacher or with other settings, or when no
    conversation is answered.
    """
    _check_manifest(path.with_suffix(".manifest.json"), answerer.settings)
    batches = answerer.plan([c.questions() for c in conversations])
    known = {answer.id: answer for answer in _read(path)}
    answers: dict[str, Conversation] = {}
    missing: list[Numbered] = []
    for number, batch in enumerate(batches):
        if all(c.id in known and known[c.id].questions() == c for c in batch):
            answers |= {c.id: known[c.id] for c in batch}
        else:
            missing.append((number, batch))
    _replace(path, json_lines(answers.values()))
    tokens, seconds, began = 0, 0.0, time.perf_counter()
    total = sum(map(len, batches))
    with progress.stage("answer the prompts", total, done=len(answers)) as stage:
        for fresh, count in answerer.answers(missing):
            _append(path, fresh)
            answers |= {answer.id: answer for answer in fresh}
            tokens, seconds = tokens + count, time.perf_counter() - began
            stage.advance(len(fresh), tokens_per_second=round(tokens / seconds, 1))
    if conversations and not answers:
        raise UserError(
            f"none of the {len(conversations)} conversations was answered: {answerer.why_not}",
            "ask something else, or lower max_new_tokens",
        )
    if len(answers) < len(conversations):
        progress.note(
            f"{len(conversations) - len(answers)} of {len(conversations)} conversations left out: "
            f"{answerer.why_not}"
        )
    ordered = [answers[c.id] for c in conversations if c.id in answers]
    _replace(path, json_lines(ordered))  # batches were made by length
    return Responses(ordered, tokens, seconds)


def _check_manifest(path: Path, settings: Mapping[str, Any]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(dict(settings), indent=2) + "\n")
        return
    made = json.loads(path.read_text())
    changed = [key for key in made | dict(settings) if made.get(key) != settings.get(key)]
    if changed:
        raise UserError(
            f"{path.parent} holds responses made with another {' and '.join(changed)}",
            "go back to those settings, or start again (--overwrite, or another folder)",
        )


def _read(path: Path) -> Iterator[Conversation]:
    """The conversations of whole lines."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                row = json.loads(line)
                messages = tuple(Message(**message) for message in row["messages"])
                yield Conversation(row["id"], messages, row.get("plain", False))


def json_lines(conversations: Iterable[Conversation]) -> str:
    """A line for each conversation, as the chat source reads them."""
    rows = [
        {
            "id": c.id,
            "messages": [
                {"role": m.role, "content": m.content} | ({} if m.ended else {"ended": False})
                for m in c.messages
            ],
        }
        | ({"plain": True} if c.plain else {})
        for c in conversations
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append(path: Path, conversations: Iterable[Conversation]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(conversations))
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Write beside, then rename over."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
