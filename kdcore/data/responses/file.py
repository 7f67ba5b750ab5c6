"""Responses that a teacher generates, once, into a file that a killed run takes up again.

The file has one conversation a line, as the chat source reads them; beside it a manifest says
what the responses depend on. Batches are planned from the prompts alone and taken up whole, so
that a resumed run generates what the unbroken one would have. What is in the file stays: several
runs may share one, each with prompts of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from filelock import FileLock, Timeout

from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError
from kdcore.runs.progress import Progress
from kdcore.runs.whole_files import write_whole

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

    path: the JSONL file; what it holds is kept, except a line that was cut short. In the end it has
    these conversations in their order, and then what others asked.
    Raises UserError when that was made by another teacher or with other settings, when it was not
    made here, or when no conversation is answered.
    """
    asked = [c.questions() for c in conversations]
    batches = answerer.plan(asked)
    planned = {question for batch in batches for question in batch}
    ordered = [question for question in asked if question in planned]
    _refuse_other(path, answerer.settings)
    known = _read(path)
    tokens, seconds = 0, 0.0
    if [*known][: len(ordered)] != ordered:  # else nothing is written: several processes may read
        with _held(path, answerer.settings, progress):
            known, tokens, seconds = _complete(batches, answerer, path, progress)
            first = {each: known[each] for each in ordered if each in known}
            write_whole(path, json_lines((first | known).values()))  # batches were made by length
    answers = [known[each] for each in ordered if each in known]
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
    return Responses(answers, tokens, seconds)


def _complete(
    batches: Sequence[Sequence[Conversation]], answerer: Answerer, path: Path, progress: Progress
) -> tuple[dict[Conversation, Conversation], int, float]:
    """What the file holds when the batches it lacks are added, and the tokens and seconds of that.

    An answer that is there stays, also where its batch is generated again.
    """
    known = _read(path)
    missing = [(n, batch) for n, batch in enumerate(batches) if not known.keys() >= set(batch)]
    write_whole(path, json_lines(known.values()))  # without a line that was cut short
    tokens, seconds, began = 0, 0.0, time.perf_counter()
    total = sum(map(len, batches))
    done = total - sum(len(batch) for _, batch in missing)
    with progress.stage("answer the prompts", total, done=done) as stage:
        for answered, count in answerer.answers(missing):
            fresh = [answer for answer in answered if answer.questions() not in known]
            _append(path, fresh)
            known |= {answer.questions(): answer for answer in fresh}
            tokens, seconds = tokens + count, time.perf_counter() - began
            stage.advance(len(answered), tokens_per_second=round(tokens / seconds, 1))
    return known, tokens, seconds


@contextmanager
def _held(path: Path, settings: Mapping[str, Any], progress: Progress) -> Iterator[None]:
    """Alone with a file, whose manifest says what is made; waits for whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"another process is writing {path}: waiting for it")
        lock.acquire()
    try:
        _refuse_other(path, settings)  # another process may just have made it
        write_whole(_manifest(path), json.dumps(dict(settings), indent=2) + "\n")
        yield
    finally:
        lock.release()


def _manifest(path: Path) -> Path:
    return path.with_suffix(".manifest.json")


def _refuse_other(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError when a file holds something else, or was made with other settings."""
    try:
        made = json.loads(_manifest(path).read_text("utf-8"))
    except FileNotFoundError:
        if path.exists():
            raise UserError(
                f"{path} is there, and holds no responses that were generated",
                "name another folder for them (data.responses.folder)",
            ) from None
        return
    except ValueError:
        raise UserError(f"{_manifest(path)} is damaged", "name another folder") from None
    changed = [key for key in made | dict(settings) if made.get(key) != settings.get(key)]
    if changed:
        raise UserError(
            f"{path.parent} holds responses made with another {' and '.join(changed)}",
            "go back to those settings, or start again (overwrite=True, or another folder)",
        )


def _read(path: Path) -> dict[Conversation, Conversation]:
    """The conversations of whole lines, each by what was asked."""
    if not path.exists():
        return {}
    found = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                row = json.loads(line)
                messages = tuple(Message(**message) for message in row["messages"])
                answer = Conversation(row["id"], messages, row.get("plain", False))
                found[answer.questions()] = answer
    return found


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
