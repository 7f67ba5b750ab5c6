"""Concurrent requests to an OpenAI-compatible endpoint, and its errors as plain messages.

The requests run in an event loop in a separate thread, so that they also work in a notebook, and an
interruption cancels the pending ones. The client library handles retries.
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
"""Placeholder for an endpoint without a key; without it, the client library would send a key for
another service from the environment."""


class EndpointClient:
    """A client of an endpoint.

    Attributes:
        spec: The endpoint.
        openai: The client package, whose errors `told` explains.

    Raises:
        UserError: The client package is not installed, or the environment variable with the key is
            not set.
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
        """Run requests concurrently.

        Args:
            requests: Functions that send a request with the given client.
            at_once: Maximum number of concurrent requests.

        Yields:
            The results, in the order of completion.
        """
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
        """Explain an error of the client library.

        Args:
            client: The client, which is used to list the endpoint's models.
            fault: The error.

        Returns:
            A UserError with one line of cause and one of cure.
        """
        sdk, place = self.openai, self.spec.endpoint
        status = getattr(fault, "status_code", None)
        fewer = "lower the batch_size of the responses, then rerun"
        if isinstance(fault, sdk.APITimeoutError):
            return UserError(f"{place} timed out", fewer)
        if isinstance(fault, sdk.APIConnectionError):
            return UserError(f"cannot reach {place}", "start the server, or fix the URL")
        if status in (401, 403):
            wanted = f"rejects the key in {self.spec.key}" if self.spec.key else "requires a key"
            return UserError(
                f"{place} {wanted}",
                "name the environment variable that holds the key: teacher.key in a spec, or --key "
                "of `kdcore cache build`",
            )
        known = await _models(client)
        if known and self.spec.model not in known:
            return UserError(
                f"{place} does not serve a model '{self.spec.model}'",
                nearest(self.spec.model, known),
            )
        if status == 404:
            return UserError(
                f"{place} does not serve a chat model '{self.spec.model}'",
                "use the base URL of its API, which often ends with /v1, and a served model",
            )
        if status == 429:
            return UserError(f"{place} received too many requests at once", fewer)
        return UserError(
            f"{place} returned an error: {self._without_key(reason(fault))}",
            "check the server's log, then rerun; finished answers are kept",
        )

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "...") if self.spec.key else words

    def alien(self) -> UserError:
        """The error for a response in another format: a web page, or another protocol."""
        return UserError(
            f"{self.spec.endpoint} does not respond like an OpenAI-compatible endpoint",
            "use the base URL of its API, which often ends with /v1",
        )


async def _models(client: openai.AsyncOpenAI) -> list[str]:
    """The models that an endpoint lists; empty when it does not list them."""
    try:
        return [model.id async for model in client.models.list()]
    except Exception:  # the error to report is the one that led here
        return []


def reason(fault: openai.APIError) -> str:
    """The first line of the server's error message, from whichever field contains it."""
    body: Any = fault.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return (
        str(said or fault.message).strip().splitlines() or ["the server did not state a reason"]
    )[0]


def _key(spec: EndpointSpec) -> str:
    if spec.key is None:
        return _NO_KEY
    key = os.environ.get(spec.key, "")
    if not key:
        raise UserError(
            f"the environment variable {spec.key} is not set", f"run export {spec.key}=... first"
        )
    return key


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(
            "an endpoint requires the package openai", "run pip install 'kdcore[endpoint]'"
        ) from None
    return openai
