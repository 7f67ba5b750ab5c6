"""Conversations, the examples of a language model's data source. The module does not need torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant, or another role of the chat template.
        content: Text of the turn.
        ended: False for a response truncated at its maximum length; its end is not learned.
    """

    role: str
    content: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order. A user turn without a following assistant turn lacks its response.

    Attributes:
        id: Name in messages, unique within its source.
        messages: The turns.
        plain: Whether to concatenate the texts, for base models, instead of applying a chat
            template.
    """

    id: str
    messages: tuple[Message, ...]
    plain: bool = False

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

    def questions(self) -> Conversation:
        """The conversation without its responses."""
        return replace(self, messages=tuple(m for m in self.messages if m.role != "assistant"))

    def answered(self, response: Message) -> Conversation:
        """The conversation with a response in place of the first missing one."""
        place = self.unanswered
        messages = (*self.messages[:place], response, *self.messages[place:])
        return replace(self, messages=messages)
