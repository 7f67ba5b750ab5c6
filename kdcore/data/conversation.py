"""What a language model's data source reads: conversations. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    role: system, user, assistant, or whatever else the chat template knows.
    ended: False for a response that was cut at its longest length; its end is not learned.
    """

    role: str
    content: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order. A user turn that no assistant turn follows lacks its response.

    id: how messages name it; unique within its source.
    plain: the texts are joined as they are, for base models, and no chat template is applied.
    """

    id: str
    messages: tuple[Message, ...]
    plain: bool = False

    @property
    def needs_response(self) -> bool:
        """Whether a user turn, not only the last, lacks its response."""
        return self.unanswered is not None

    @property
    def unanswered(self) -> int | None:
        """Where the first missing response belongs in `messages`."""
        for place, message in enumerate(self.messages, start=1):
            follower = self.messages[place : place + 1]
            if message.role == "user" and (not follower or follower[0].role == "user"):
                return place
        return None

    @property
    def turns(self) -> int:
        """How many responses it gets, when it is asked without any."""
        return sum(message.role == "user" for message in self.messages)

    def questions(self) -> Conversation:
        """Without its responses."""
        return replace(self, messages=tuple(m for m in self.messages if m.role != "assistant"))

    def answered(self, response: Message) -> Conversation:
        """With the first missing response filled in."""
        place = self.unanswered
        messages = (*self.messages[:place], response, *self.messages[place:])
        return replace(self, messages=messages)
