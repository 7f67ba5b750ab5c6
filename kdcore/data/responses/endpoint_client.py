"""Requests to an OpenAI-compatible endpoint, several at a time, and its faults told plainly.

The requests run in an event loop of a thread of their own, so that this works in a notebook too,
and an interruption cancels what is under way. Retries are the client library's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import as_completed
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from kdcore.errors import UserError, nearest
from kdcore.specs.generate_data import EndpointSpec

if TYPE_CHECKING:
    import openai

Result = TypeVar("Result")

_NO_KEY = "none"
"""What the client library sends where no key is asked for; without it, it would take a key meant
for somebody else from the environment."""


class EndpointClient:
    """What asks an endpoint.

    ``openai``: the client package, whose faults `told` explains.
    Raises UserError when it, or the variable that holds the key, is missing.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self._key = _key(spec)
        self.openai = _openai()

    def each(
        self,
        requests: Sequence[Callable[[openai.AsyncOpenAI], Awaitable[Result]]],
        at_once: int,
    ) -> Iterator[Result]:
        """The results as they come in, of at most so many under way at once."""
        loop = asyncio.new_event_loop()
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        client = self.openai.AsyncOpenAI(base_url=self.spec.endpoint, api_key=self._key)
        gate = asyncio.Semaphore(at_once)

        async def in_turn(request: Callable[[openai.AsyncOpenAI], Awaitable[Result]]) -> Result:
            async with gate:
                return await request(client)

        waiting = [asyncio.run_coroutine_threadsafe(in_turn(each), loop) for each in requests]
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

    async def told(self, client: openai.AsyncOpenAI, fault: openai.APIError) -> UserError:
        """What the library says, in one plain line of cause and one of cure."""
        sdk, place = self.openai, self.spec.endpoint
        status = getattr(fault, "status_code", None)
        fewer = "lower the batch_size of the responses, and go on"
        if isinstance(fault, sdk.APITimeoutError):
            return UserError(f"{place} does not answer in time", fewer)
        if isinstance(fault, sdk.APIConnectionError):
            return UserError(f"{place} cannot be reached", "start the server, or mend the URL")
        if status in (401, 403):
            asks = f"refuses the key in {self.spec.key}" if self.spec.key else "asks for a key"
            return UserError(
                f"{place} {asks}",
                "name the environment variable that holds it: teacher.key in a spec, --key of "
                "`kdcore cache build`",
            )
        known = await _models(client)
        if known and self.spec.model not in known:
            return UserError(
                f"there is no model '{self.spec.model}' at {place}",
                nearest(self.spec.model, known),
            )
        if status == 404:
            return UserError(
                f"there is no chat model '{self.spec.model}' at {place}",
                "name the base URL of its API, which often ends with /v1, and a model it serves",
            )
        if status == 429:
            return UserError(f"{place} refuses so many requests", fewer)
        return UserError(
            f"{place} refuses: {self._without_key(reason(fault))}",
            "look at what the server logs; what was answered is kept, and the next run goes on",
        )

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "...") if self.spec.key else words

    def alien(self) -> UserError:
        """For an answer that is none: a web page, or another protocol."""
        return UserError(
            f"{self.spec.endpoint} does not answer as an OpenAI-compatible endpoint does",
            "name the base URL of its API, which often ends with /v1",
        )


async def _models(client: openai.AsyncOpenAI) -> list[str]:
    """The models an endpoint says it has; none when it does not say."""
    try:
        return [model.id async for model in client.models.list()]
    except Exception:  # this is asked to explain another fault, which is the one to tell
        return []


def reason(fault: openai.APIError) -> str:
    """The first line of the server's own words, wherever it put them."""
    body: Any = fault.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return (str(said or fault.message).strip().splitlines() or ["no reason is given"])[0]


def _key(spec: EndpointSpec) -> str:
    if spec.key is None:
        return _NO_KEY
    key = os.environ.get(spec.key, "")
    if not key:
        raise UserError(
            f"the environment variable {spec.key} is not set", f"export {spec.key}=... first"
        )
    return key


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            "an endpoint needs the package openai", "pip install 'kdcore[endpoint]'"
        ) from None
    return openai
