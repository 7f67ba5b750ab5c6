"""Decoding by a running OpenAI-compatible server, with its counts of drafts if it publishes them.

The completions endpoint receives each prompt as token ids, so that no template or tokenizer of the
server takes part. vLLM counts its drafts in Prometheus counters at ``/metrics``; their growth over
a batch is what the batch drafted, as long as nobody else uses the server.

The rule of counting is the server's: it drafts from the second new token of an answer on, since the
first one comes with the prompt's pass, and it counts all that the target accepts in the last round,
also beyond the length limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from itertools import pairwise

from kdcore.data.responses.endpoint.client import EndpointClient, RequestLoop
from kdcore.data.responses.endpoint.tokens import continuation, tokens_of
from kdcore.decoding.baseline import DecodedBatch, DecodingSettings
from kdcore.decoding.loop import Counter
from kdcore.runs.progress import Progress
from kdcore.specs.parts.endpoint import EndpointSpec

MOST_BYTES = 2**26
"""Size of a response: an answer with its token ids, or a page of counters."""
_SAMPLE = re.compile(r"^vllm:spec_decode_num_(\w+?)_total\{(.*)\} (\S+)$", re.MULTILINE)
_ONE = DecodingSettings(
    batch_size=1, longest_prompt=1, max_new_tokens=1, temperature=0.0, ends=(), threads=1
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ServedDecoder:
    """A server that decodes batches of prompts.

    Args:
        spec: The server and the name of its model.
        settings: The settings of all batches.

    Raises:
        UserError: The client library is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(self, spec: EndpointSpec, settings: DecodingSettings) -> None:
        self.spec, self.settings = spec, settings
        self._endpoint = EndpointClient(spec, MOST_BYTES)
        self._client = self._endpoint.connect()
        self._loop = RequestLoop(settings.batch_size)

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        """Answer prompts at once.

        Args:
            prompts: Token ids of each prompt.
            seed: Sampling seed of the first prompt; the next ones follow it.

        Returns:
            The answers, the time of the requests, and the server's counts of drafts.

        Raises:
            UserError: The server cannot be reached, or responds with an error or in another format.
        """
        before = self.counts() or {}
        began = time.perf_counter()
        pending: list[Future[tuple[list[int] | None, int]]] = [
            self._loop.submit(partial(self._answer, prompt, seed + place))
            for place, prompt in enumerate(prompts)
        ]
        answers = [each.result() for each in pending]
        seconds = time.perf_counter() - began
        after = self.counts() or {}
        known = [tokens for tokens, _ in answers if tokens is not None]
        return DecodedBatch(
            sum(count for _, count in answers),
            known if len(known) == len(answers) else None,
            _counter({name: after[name] - before.get(name, 0) for name in after}),
            seconds,
        )

    def counts(self) -> dict[str | int, int] | None:
        """Read the server's counters of drafts.

        Returns:
            ``drafts``, ``accepted_tokens``, and the accepted tokens of each level by its number
            from 0; empty if the server does not draft, None if it does not publish counters.

        Raises:
            UserError: The server cannot be reached.
        """
        return self._loop.submit(self._page).result()

    def close(self) -> None:
        """End the connection."""
        self._loop.close(self._client)

    async def _answer(self, prompt: Sequence[int], seed: int) -> tuple[list[int] | None, int]:
        asked = continuation(
            self.spec.model,
            prompt,
            most=self.settings.max_new_tokens,
            ends=list(self.settings.ends),
            temperature=self.settings.temperature,
            seed=seed,
        )
        found = await self._endpoint.answer(
            self._client, lambda: self._client.completions.create(**asked), tokens_of
        )
        assert found is not None  # no error stands for a missing answer
        return found

    async def _page(self) -> dict[str | int, int] | None:
        root = self.spec.endpoint.rstrip("/").removesuffix("/v1")
        return await self._endpoint.answer(
            self._client,
            lambda: self._client.get(f"{root}/metrics", cast_to=str),
            lambda text: _counters(text, self.spec.model),
            lambda fault: isinstance(fault, self._endpoint.openai.APIStatusError),
        )


def refuse_unreachable(servers: Mapping[str, EndpointSpec], progress: Progress) -> None:
    """Check that servers can be reached, and note those without counters.

    Args:
        servers: Name of a server -> the server.
        progress: Receiver of the notes.

    Raises:
        UserError: A server cannot be reached.
    """
    for name, spec in servers.items():
        with closing(ServedDecoder(spec, _ONE)) as server:
            if server.counts() is None:
                progress.note(
                    f"servers.{name}: {spec.endpoint} does not publish metrics, so its speed is "
                    "measured without its acceptance"
                )


def _counter(grown: Mapping[str | int, int]) -> Counter | None:
    """The rounds with drafts by their number of accepted tokens.

    None without drafts, and where counts shrink: the server was restarted meanwhile.
    """
    rounds = grown.get("drafts", 0)
    if not rounds or min(grown.values()) < 0:
        return None
    levels = sorted(name for name in grown if isinstance(name, int))
    reached = [rounds, *(grown[level] for level in levels), 0]
    accepted = {n: more - fewer for n, (more, fewer) in enumerate(pairwise(reached))}
    emitted = rounds + grown.get("accepted_tokens", 0)
    return Counter(rounds, emitted, {n: times for n, times in accepted.items() if times})


def _counters(text: str, model: str) -> dict[str | int, int]:
    """The counters of speculative decoding of one model, added over its engines."""
    found: dict[str | int, int] = {}
    for name, written, value in _SAMPLE.findall(text):
        labels: Mapping[str, str] = dict(_LABEL.findall(written))
        if labels.get("model_name", model) != model:
            continue
        if name == "accepted_tokens_per_pos":
            key: str | int = int(labels["position"])
        elif name in ("drafts", "accepted_tokens"):
            key = name
        else:
            continue
        found[key] = found.get(key, 0) + int(float(value))
    return found
