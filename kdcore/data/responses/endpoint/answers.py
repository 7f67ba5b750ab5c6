"""Answers of a model at an OpenAI-compatible endpoint, requested concurrently."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.endpoint.client import EndpointClient, reason
from kdcore.data.responses.file import Numbered
from kdcore.data.templates.rendering import REASONING
from kdcore.errors import UserError
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.training import GenerationSpec

if TYPE_CHECKING:
    import openai

MOST_BYTES = 2**24
"""Size of a response with one answer; its text is far shorter."""
MOST_TOKENS = 2**32


class EndpointAnswers:
    """A `kdcore.data.responses.file.Answerer` whose batches are single conversations.

    Args:
        spec: The endpoint.
        generation: The generation settings.

    Raises:
        UserError: The client library is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(self, spec: EndpointSpec, generation: GenerationSpec) -> None:
        self.name = spec.model
        self.why_not = (
            f"{spec.model} returned an empty answer, or they are too long for its context"
        )
        self.settings: Mapping[str, Any] = {
            "endpoint": spec.endpoint,
            "model": spec.model,
            "max_new_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
        } | ({"seed": generation.seed} if generation.temperature else {})
        self._spec, self._generation = spec, generation
        self._client = EndpointClient(spec, MOST_BYTES)

    def plan(self, asked: Sequence[Conversation]) -> list[list[Conversation]]:
        """Batches of one conversation each.

        Args:
            asked: Conversations without responses.

        Returns:
            The batches.

        Raises:
            UserError: A conversation is plain text, which a chat endpoint cannot continue.
        """
        if any(c.plain for c in asked):
            raise UserError(
                f"{self._spec.endpoint} requires chats, but the source sets template: none",
                "remove template: none, or use a local model",
            )
        return [[conversation] for conversation in asked]

    def answers(self, batches: Sequence[Numbered]) -> Iterator[tuple[list[Conversation], int]]:
        """Answer conversations with ``batch_size`` concurrent requests.

        Args:
            batches: Numbered batches of the plan.

        Yields:
            The answered conversation, or an empty list, and the number of generated tokens, in the
            order of completion.
        """
        requests = [partial(self._in_turn, number, batch[0]) for number, batch in batches]
        yield from self._client.each(requests, self._generation.batch_size)

    async def _in_turn(
        self, number: int, conversation: Conversation, client: openai.AsyncOpenAI
    ) -> tuple[list[Conversation], int]:
        """The conversation, answered turn by turn, or none; and the number of generated tokens."""
        tokens = 0
        while conversation.needs_response:
            response, count = await self._response(client, conversation, number)
            tokens += count
            if response is None:
                return [], tokens
            conversation = conversation.answered(response)
        return [conversation], tokens

    async def _response(
        self, client: openai.AsyncOpenAI, conversation: Conversation, number: int
    ) -> tuple[Message | None, int]:
        """The first missing response; None when it is empty or filtered, or the prompt too long."""
        drawn: dict[str, Any] = {}
        if self._generation.temperature:
            drawn |= {"seed": self._generation.seed + number}
        answered = await self._client.answer(
            client,
            lambda: client.chat.completions.create(
                model=self._spec.model,
                **chat_of(conversation),
                max_tokens=self._generation.max_new_tokens,  # few servers know its successor
                temperature=self._generation.temperature,
                top_p=1.0,  # a server may have another default
                **drawn,
            ),
            _read,
            too_long,
        )
        if answered is None:
            return None, 0
        text, thought, ended, tokens = answered
        if not _is_said(text) or ended not in (None, "stop", "length"):
            return None, tokens
        fields = {REASONING[0]: thought} if thought else {}
        return Message("assistant", text, ended != "length", fields=fields), tokens


def chat_of(
    conversation: Conversation, arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of a request that ask for a conversation's first missing response.

    Args:
        conversation: The conversation.
        arguments: Further arguments of the server's chat template.

    Returns:
        The messages, the tools, and the arguments of the chat template.
    """
    before = conversation.messages[: conversation.unanswered]
    tools, others = conversation.tools_and_others()
    others = dict(arguments or {}) | others
    request: dict[str, Any] = {"messages": [message.said for message in before]}
    if tools:
        request["tools"] = tools
    if others:
        request["extra_body"] = {"chat_template_kwargs": others}
    return request


def _read(completion: Any) -> tuple[Any, Any, Any, int]:
    """The text, the thought before it, why it ended, and its number of tokens.

    Raises ValueError for another number.
    """
    choice, usage = completion.choices[0], completion.usage
    tokens = usage.completion_tokens if usage else 0
    if not isinstance(tokens, int) or not 0 <= tokens <= MOST_TOKENS:
        raise ValueError(f"usage.completion_tokens is {tokens!r}")
    message = choice.message
    thought = next(filter(_is_said, (getattr(message, name, None) for name in REASONING)), None)
    return message.content, thought, choice.finish_reason, tokens


def _is_said(text: Any) -> bool:
    """Whether it is a nonblank string, not a list of parts, without a split character."""
    return isinstance(text, str) and bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


def too_long(fault: openai.APIError) -> bool:
    """Whether a server refuses a prompt because it exceeds the model's context."""
    text = f"{fault.code} {reason(fault)}".lower()
    return getattr(fault, "status_code", None) == 400 and "context" in text and "length" in text
