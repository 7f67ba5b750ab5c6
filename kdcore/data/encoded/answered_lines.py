"""The lines of a file of answered conversations, which are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.encoded.examples import Examples

_NOTHING: tuple[Mapping[str, Any], str] = {}, ""


class _Opened:
    """A file that stays open, and that the workers of a process read too."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, start)


class AnsweredLines:
    """The complete lines of a file, by what they ask; of lines that ask the same the first counts.

    The file stays open, so a program that replaces or extends it changes nothing here.

    Args:
        path: The file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        if not path.exists():
            return
        self._file = _Opened(path)
        start = 0
        with open(self._file.descriptor, "rb", closefd=False) as file:
            for line in file:
                if line.endswith(b"\n"):  # a killed process may leave a part of the last one
                    key = asked_by(_conversation(json.loads(line)))
                    self._places.setdefault(key, (start, len(line)))
                start += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[bytes]:
        """The keys (`asked_by`), in the order of the lines."""
        return iter(self._places)

    def line(self, key: bytes) -> bytes:
        """The line that answers what has a key."""
        return self._file.read(*self._places[key])

    def conversations(
        self, asked: Iterable[tuple[bytes, Mapping[str, Any], str]]
    ) -> Sequence[Conversation]:
        """The answered conversations of some keys.

        Args:
            asked: Keys, with the fields and the teacher that the data say beside what is asked;
                keys without a line are left out.

        Returns:
            The conversations in order, which take 24 bytes each beside those fields.
        """
        places, beside = array("q"), list[tuple[Mapping[str, Any], str]]()
        for key, kept, teacher in asked:
            if key in self:
                places.extend(self._places[key])
                beside.append((kept, teacher) if kept or teacher else _NOTHING)
        if not beside:
            return []
        file = self._file  # and not this object, whose keys are no longer needed

        def one(number: int) -> Conversation:
            line = file.read(*places[2 * number : 2 * number + 2])
            kept, teacher = beside[number]
            return replace(_conversation(json.loads(line)), kept=kept, teacher=teacher)

        return Examples(len(beside), lambda numbers: list(map(one, numbers)))


def asked_by(conversation: Conversation) -> bytes:
    """16 bytes that tell what a conversation asks, without its responses."""
    asked = replace(conversation.questions(), kept={}, teacher="")
    return hashlib.blake2b(
        json.dumps(_row(asked), sort_keys=True).encode(), digest_size=16
    ).digest()


def json_line(conversation: Conversation) -> str:
    """The line of a conversation, in the format of the chat source."""
    return json.dumps(_row(conversation), ensure_ascii=False) + "\n"


def _row(conversation: Conversation) -> dict[str, Any]:
    tools, others = conversation.tools_and_others()
    optional = {
        "tools": tools,
        "chat_template_kwargs": others,
        "plain": conversation.plain,
        "tokenizer": conversation.tokenizer,
        "teacher": conversation.teacher,
    }
    messages = [message.plain() for message in conversation.messages]
    own = {"id": conversation.id, "messages": messages}
    return {**conversation.kept, **own, **{k: v for k, v in optional.items() if v}}


def _conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a line."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return Conversation(
        row["id"],
        tuple(map(Message.of, row["messages"])),
        row.get("plain", False),
        tools | row.get("chat_template_kwargs", {}),
        row.get("tokenizer", ""),
    )
