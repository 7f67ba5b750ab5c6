"""A model behind an OpenAI-compatible endpoint answers conversations, several at a time.

The requests run in an event loop of a thread of their own, so that this works in a notebook too,
and an interruption cancels what is under way. Retries are the client library's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from threading import Thread
from typing import TYPE_CHECKING, Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.generation import Numbered
from kdcore.data_specs import EndpointSpec
from kdcore.errors import UserError, nearest
from kdcore.specs import GenerationSpec

if TYPE_CHECKING:
    import openai

_NO_KEY = "none"
"""What the client library sends where no key is asked for; without it, it would take a key meant
for somebody else from the environment."""


class EndpointAnswers:
    """See `kdcore.data.generation.Answerer`. Each conversation is a batch of its own.

    Raises UserError when the client library or the variable that holds the key is missing.
    """

    def __init__(self, spec: EndpointSpec, generation: GenerationSpec) -> None:
        self.name = spec.model
        self.why_not = f"{spec.model} gave an empty answer, or they are too long for it"
        self.settings: Mapping[str, Any] = {
            "endpoint": spec.endpoint,
            "model": spec.model,
            "max_new_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
        } | ({"seed": generation.seed} if generation.temperature else {})
        self._spec, self._generation = spec, generation
        self._key = _key(spec)
        self._library = _library()

    def plan(self, asked: Sequence[Conversation]) -> list[list[Conversation]]:
        """One after the other.

        Raises UserError for texts without a chat, which a chat endpoint cannot go on with.
        """
        if any(c.plain for c in asked):
            raise UserError(
                f"{self._spec.endpoint} answers chats, and the source has `template: none`",
                "leave the template out, or name a local model",
            )
        return [[conversation] for conversation in asked]

    def answers(self, batches: Sequence[Numbered]) -> Iterator[tuple[list[Conversation], int]]:
        """As they come in, ``batch_size`` requests at a time."""
        loop = asyncio.new_event_loop()
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        client = self._library.AsyncOpenAI(base_url=self._spec.endpoint, api_key=self._key)
        gate = asyncio.Semaphore(self._generation.batch_size)
        waiting = [
            asyncio.run_coroutine_threadsafe(self._in_turn(client, gate, number, *batch), loop)
            for number, batch in batches
        ]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for each in waiting:
                each.cancel()
            asyncio.run_coroutine_threadsafe(client.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _in_turn(
        self,
        client: openai.AsyncOpenAI,
        gate: asyncio.Semaphore,
        number: int,
        conversation: Conversation,
    ) -> tuple[list[Conversation], int]:
        """The conversation answered turn by turn, or none, and how many tokens that took."""
        tokens = 0
        async with gate:
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
        """The first missing response, None when it is empty, filtered, or too long to be asked."""
        before = conversation.messages[: conversation.unanswered]
        messages: Any = [{"role": m.role, "content": m.content} for m in before]
        drawn: Any = {}
        if self._generation.temperature:
            drawn = {"seed": self._generation.seed + number}
        try:
            completion = await client.chat.completions.create(
                model=self._spec.model,
                messages=messages,
                max_tokens=self._generation.max_new_tokens,  # its successor is not known everywhere
                temperature=self._generation.temperature,
                top_p=1.0,  # or a server may cut the distribution as it likes
                **drawn,
            )
            choice = completion.choices[0]
        except self._library.APIError as fault:
            if _too_long(fault):
                return None, 0
            raise await self._told(client, fault) from fault
        except (AttributeError, IndexError, TypeError) as fault:  # a web page, or another protocol
            raise UserError(
                f"{self._spec.endpoint} does not answer as an OpenAI-compatible endpoint does",
                "name the base URL of its API, which often ends with /v1",
            ) from fault
        text, count = choice.message.content, completion.usage
        tokens = count.completion_tokens if count else 0
        if not text or not text.strip() or choice.finish_reason not in (None, "stop", "length"):
            return None, tokens
        return Message("assistant", text, ended=choice.finish_reason != "length"), tokens

    async def _told(self, client: openai.AsyncOpenAI, fault: openai.APIError) -> UserError:
        """What the library says, in one plain line of cause and one of cure."""
        library, place = self._library, self._spec.endpoint
        status = getattr(fault, "status_code", None)
        if isinstance(fault, library.APITimeoutError):
            return UserError(f"{place} does not answer in time", "lower responses.batch_size")
        if isinstance(fault, library.APIConnectionError):
            return UserError(f"{place} cannot be reached", "start the server, or mend the URL")
        if status in (401, 403):
            asks = f"refuses the key in {self._spec.key}" if self._spec.key else "asks for a key"
            return UserError(
                f"{place} {asks}", "name the environment variable that holds it: teacher.key"
            )
        known = await _models(client)
        if known and self._spec.model not in known:
            return UserError(
                f"there is no model '{self._spec.model}' at {place}",
                nearest(self._spec.model, known),
            )
        if status == 404:
            return UserError(
                f"there is no chat model '{self._spec.model}' at {place}",
                "name the base URL of its API, which often ends with /v1, and a model it serves",
            )
        if status == 429:
            return UserError(
                f"{place} refuses so many requests", "lower responses.batch_size, then --resume"
            )
        return UserError(
            f"{place} refuses: {_reason(fault).replace(self._key, '...')}",
            "look at what the server logs; --resume goes on from what was answered",
        )


async def _models(client: openai.AsyncOpenAI) -> list[str]:
    """The models an endpoint says it has; none when it does not say."""
    try:
        return [model.id async for model in client.models.list()]
    except Exception:  # this is asked to explain another fault, which is the one to tell
        return []


def _reason(fault: openai.APIError) -> str:
    """The first line of the server's own words, wherever it put them."""
    body: Any = fault.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return (str(said or fault.message).strip().splitlines() or ["no reason is given"])[0]


def _too_long(fault: openai.APIError) -> bool:
    text = f"{fault.code} {_reason(fault)}".lower()
    return getattr(fault, "status_code", None) == 400 and "context" in text and "length" in text


def _key(spec: EndpointSpec) -> str:
    if spec.key is None:
        return _NO_KEY
    key = os.environ.get(spec.key, "")
    if not key:
        raise UserError(
            f"the environment variable {spec.key} is not set", f"export {spec.key}=... first"
        )
    return key


def _library() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            "an endpoint needs the package openai", "pip install 'kdcore[endpoint]'"
        ) from None
    return openai
