"""Conversations, the examples of a language model's data source. The module does not need torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant, or another role of the chat template.
        content: Text of the turn.
        ended: False for a response truncated at its maximum length; its end is not learned.
        learned: False for a response that is context only.
        tokens: Token ids of a generated response with its end token, for the tokenizer of the
            conversation; empty if only the text is known.
        fields: Further fields for the chat template, e.g. tool_calls or reasoning_content; an entry
            ``content: None`` stands for a message without a content.
    """

    role: str
    content: str
    ended: bool = True
    learned: bool = True
    tokens: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def said(self) -> dict[str, Any]:
        """The message as chat templates and endpoints read it."""
        return {"role": self.role, "content": self.content, **self.fields}

    def plain(self) -> dict[str, Any]:
        """The message as plain data, in the format of the chat source."""
        return (
            self.said
            | ({} if self.ended else {"ended": False})
            | ({} if self.learned else {"train": False})
            | ({"tokens": list(self.tokens)} if self.tokens else {})
        )

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Message:
        """The message of its plain data."""
        said = dict(plain)
        role, content = said.pop("role"), said.pop("content")
        ended, learned = said.pop("ended", True), said.pop("train", True)
        tokens = tuple(said.pop("tokens", ()))
        if content is None:
            content, said = "", {"content": None} | said
        return cls(role, content, ended, learned, tokens, said)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order. A user turn without a following assistant turn lacks its response.

    Attributes:
        id: Name in messages, unique within its source.
        messages: The turns.
        plain: Whether to concatenate the texts, for base models, instead of applying a chat
            template.
        arguments: Arguments of the chat template for this conversation, e.g. tools.
        tokenizer: Digest of the tokenizer of the messages' tokens; empty without tokens.
        unread: Fields of the row that the source does not read, for a note.
        kept: Further fields of the row that scores of answers read.
        notes: Notes of the source about the conversation, e.g. about turns that it left out.
        teacher: As in `kdcore.method.records.Row`.
    """

    id: str
    messages: tuple[Message, ...]
    plain: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tokenizer: str = ""
    unread: tuple[str, ...] = field(default=(), compare=False)
    kept: Mapping[str, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    teacher: str = field(default="", compare=False)

    @property
    def needs_response(self) -> bool:
        """Whether any user turn lacks its response."""
        return self.unanswered is not None

    @property
    def unanswered(self) -> int | None:
        """The index in `messages` of the first missing response; None when all are present."""
        for place, message in enumerate(self.messages, start=1):
            follower = self.messages[place : place + 1]
            if message.role == "user" and (not follower or follower[0].role == "user"):
                return place
        return None

    @property
    def turns(self) -> int:
        """The number of user turns, which is the number of responses to generate."""
        return sum(message.role == "user" for message in self.messages)

    @property
    def asked(self) -> str:
        """A digest of the turns but the responses: conversations with the same ask the same."""
        said = [(m.role, m.content) for m in self.messages if m.role != "assistant"]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def tools_and_others(self) -> tuple[Any, dict[str, Any]]:
        """The tools, None without any, and the other arguments of the chat template."""
        others = dict(self.arguments)
        return others.pop("tools", None), others

    def questions(self) -> Conversation:
        """The conversation without its responses."""
        asked = tuple(m for m in self.messages if m.role != "assistant")
        return replace(self, messages=asked, tokenizer="")

    def answered(self, response: Message, tokenizer: str = "") -> Conversation:
        """The conversation with a response in place of the first missing one.

        Args:
            response: The response.
            tokenizer: Digest of the tokenizer of its tokens.

        Returns:
            The new conversation.
        """
        place = self.unanswered
        messages = (*self.messages[:place], response, *self.messages[place:])
        return replace(self, messages=messages, tokenizer=tokenizer or self.tokenizer)
