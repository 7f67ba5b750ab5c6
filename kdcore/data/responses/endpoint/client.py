"""Concurrent requests to an OpenAI-compatible endpoint, and its errors as plain messages.

A response may be wrong, huge or endless: the time and size of each are bounded. The requests run in
an event loop in a separate thread, so that they also work in a notebook, and an interruption
cancels the pending ones. The client library handles retries.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kdcore.components.optional_packages import optional_package
from kdcore.errors import UserError, nearest
from kdcore.specs.parts.endpoint import EndpointSpec

if TYPE_CHECKING:
    import openai

Result = TypeVar("Result")

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of reading a response that has another form."""

_ENCODINGS = ("", "identity", "gzip", "deflate")
"""Those that cannot turn a few bytes into gigabytes at once."""
_MODELS, _MODELS_SECONDS = 1000, 10.0
"""Bounds of the list of models, which is only for a better message."""
_REASON = 300
"""Characters of a server's error message."""

_FEWER = "send fewer requests at once (batch_size, or at_once of win_rate), then rerun"

_NO_KEY = "none"
"""Placeholder for an endpoint without a key; without it, the client library would send a key for
another service from the environment."""


class Unavailable(UserError):
    """An endpoint does not answer at present; a later request may succeed."""


class RequestLoop:
    """An event loop in a thread of its own, which bounds the number of concurrent requests.

    Args:
        at_once: Maximum number of concurrent requests.
    """

    def __init__(self, at_once: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._gate = asyncio.Semaphore(at_once)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def submit(self, request: Callable[[], Awaitable[Result]]) -> Future[Result]:
        """Start a request as soon as the number of concurrent ones allows it.

        Args:
            request: Function that sends the request.

        Returns:
            The pending result.
        """

        async def in_turn() -> Result:
            async with self._gate:
                return await request()

        return asyncio.run_coroutine_threadsafe(in_turn(), self._loop)

    @contextmanager
    def connected(self, client: EndpointClient) -> Iterator[openai.AsyncOpenAI]:
        """Connect to an endpoint for a block; its requests run in this loop."""
        connection = client.connect()
        try:
            yield connection
        finally:
            asyncio.run_coroutine_threadsafe(connection.close(), self._loop).result()

    def close(self, *clients: openai.AsyncOpenAI) -> None:
        """Cancel the pending requests, close the clients that sent them, and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancelled(clients), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancelled(clients: Iterable[openai.AsyncOpenAI]) -> None:
    """Cancel all other tasks of the running loop, wait until they have ended, close clients."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for client in clients:
        await client.close()


def as_completed_results(waiting: Sequence[Future[Result]]) -> Iterator[Result]:
    """Yield results in the order of completion; cancel the others if the consumer stops."""
    try:
        for done in as_completed(waiting):
            yield done.result()
    finally:
        for each in waiting:
            each.cancel()


class EndpointClient:
    """A client of an endpoint.

    Attributes:
        spec: The endpoint.
        most_bytes: Maximum size of the body of a response.
        openai: The client package, whose errors `told` explains.

    Raises:
        UserError: The client package is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(self, spec: EndpointSpec, most_bytes: int) -> None:
        self.spec, self.most_bytes = spec, most_bytes
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
        with RequestLoop(at_once) as loop, loop.connected(self) as client:
            yield from as_completed_results([loop.submit(partial(r, client)) for r in requests])

    def connect(self, retries: int | None = None) -> openai.AsyncOpenAI:
        """Return a client of the endpoint, whose responses are bounded.

        Args:
            retries: Number of retries after a server's failure (default: the library's).

        Returns:
            The client; its user closes it in the event loop of its requests.
        """
        client: openai.AsyncOpenAI = self.openai.AsyncOpenAI(
            base_url=self.spec.endpoint,
            api_key=self._key,
            timeout=self.spec.timeout,
            default_headers={"Accept-Encoding": ", ".join(_ENCODINGS[2:])},
            http_client=self.openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [self._bound]}
            ),
            **({} if retries is None else {"max_retries": retries}),
        )
        return client

    async def answer(
        self,
        client: openai.AsyncOpenAI,
        send: Callable[[], Awaitable[Any]],
        read: Callable[[Any], Result],
        refused: Callable[[openai.APIError], bool] = lambda fault: False,
    ) -> Result | None:
        """Send a request, wait for the response and read it.

        A server that limits the rate of requests and says when to come back is asked again then,
        as long as the time of the request lasts.

        Args:
            client: The client.
            send: Function that sends the request with the client.
            read: Function of the response.
            refused: Whether an error of the server means that there is no answer to this request.

        Returns:
            What ``read`` returns, or None for such an error.

        Raises:
            UserError: The endpoint cannot be reached, takes too long, returns an error, or
                responds in another format.
        """
        busy: openai.RateLimitError | None = None
        try:
            async with asyncio.timeout(self.spec.timeout):
                while True:
                    try:
                        response = await send()
                        break
                    except self.openai.RateLimitError as fault:
                        busy = fault
                        await asyncio.sleep(_pause(fault))
        except TimeoutError:
            raise (await self.told(client, busy) if busy else self._late()) from None
        except self.openai.APIError as fault:
            if refused(fault):
                return None
            raise await self.told(client, fault) from fault
        except (RecursionError, ValueError) as fault:  # it is not JSON
            raise self.alien() from fault
        try:
            return read(response)
        except MALFORMED as fault:  # e.g. a web page
            raise self.alien() from fault

    async def _bound(self, response: Any) -> None:
        """Refuse a response that leads elsewhere, and bound the size of its body.

        The HTTP client calls this before it follows a redirect and before it reads the body.
        """
        place = self.spec.endpoint
        if response.has_redirect_location:
            try:
                target = response.url.join(response.headers["location"])
            except Exception as fault:  # InvalidURL of the HTTP client, of which there are two
                raise self.alien() from fault
            if _origin(target) != _origin(response.url):
                there = self._without_key(f"{target.scheme}://{target.host}")
                raise UserError(
                    f"{place} redirects to another server: {there}",
                    "if you trust that server with the conversations and the key, use its URL as "
                    "the endpoint",
                )
        encoding = response.headers.get("content-encoding", "").lower()
        if encoding not in _ENCODINGS:
            raise UserError(
                f"{place} compresses its responses by '{encoding[:40]}', which was not requested",
                "turn off the compression in the server",
            )
        chunks, size = response.aiter_bytes(), 0

        async def bounded(chunk_size: int | None = None) -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                if size > self.most_bytes:
                    raise UserError(
                        f"{place} sends a response of more than {self.most_bytes:,} bytes",
                        "use the base URL of an OpenAI-compatible API",
                    )
                yield chunk

        response.aiter_bytes = bounded

    def _late(self) -> Unavailable:
        return Unavailable(
            f"{self.spec.endpoint} does not complete a response within {self.spec.timeout:g} s",
            f"raise timeout of the endpoint, or {_FEWER}",
        )

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
        if isinstance(fault.__cause__, UserError):  # of `_bound`; some versions wrap it
            return fault.__cause__
        if isinstance(fault, sdk.APITimeoutError):
            return self._late()
        if isinstance(fault, sdk.APIConnectionError):
            return Unavailable(f"cannot reach {place}", "start the server, or fix the URL")
        if status in (401, 403):
            wanted = f"rejects the key in {self.spec.key}" if self.spec.key else "requires a key"
            return UserError(
                f"{place} {wanted}",
                "name the environment variable that holds the key: key beside endpoint in a spec, "
                "or --key of `kdcore cache build`",
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
            return Unavailable(f"{place} received too many requests at once", _FEWER)
        kind = Unavailable if status is not None and status >= 500 else UserError
        return kind(
            f"{place} returned an error: {self.reason(fault)}",
            "check the server's log, then rerun",
        )

    def reason(self, fault: openai.APIError) -> str:
        """The first line of the server's error message, without the key, which it may repeat."""
        return self._without_key(reason(fault))[:_REASON]

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
        async with asyncio.timeout(_MODELS_SECONDS):
            listed = [model.id for model in (await client.models.list()).data[:_MODELS]]
            return [name for name in listed if isinstance(name, str)]
    except Exception:  # the error to report is the one that led here
        return []


def reason(fault: openai.APIError) -> str:
    """The first line of the server's error message, from whichever field contains it.

    It may be long, and may repeat the key: `EndpointClient.reason` is for messages.
    """
    body: Any = fault.body
    said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    lines = str(said or fault.message).strip().splitlines()
    return lines[0] if lines else "the server did not state a reason"


def _pause(fault: openai.RateLimitError) -> float:
    """The seconds after which a server wants to be asked again. Raises the fault without them."""
    try:
        seconds = float(fault.response.headers["retry-after"])
    except (KeyError, ValueError):
        raise fault from None
    if not 0 < seconds < math.inf:
        raise fault
    return seconds


def _origin(url: Any) -> tuple[str, str, int | None]:
    ports = {"http": 80, "https": 443}
    return url.scheme, url.host, url.port or ports.get(url.scheme)


def _key(spec: EndpointSpec) -> str:
    if spec.key is None:
        return _NO_KEY
    key = os.environ.get(spec.key, "")
    if not key:
        raise UserError(
            f"the environment variable {spec.key} is not set", f"run export {spec.key}=... first"
        )
    if not re.fullmatch("[!-~]+", key):  # a header cannot carry it, and an error would show it
        raise UserError(
            f"the environment variable {spec.key} does not hold a key: its value has a blank, a "
            "line break or a character beyond ASCII",
            f"set {spec.key} to the key alone",
        )
    return key


def _openai() -> Any:
    return optional_package("openai", "kdcore[endpoint]", "an endpoint")
