"""The top-k classes at the learned positions of rows, from an endpoint that scores given tokens.

The completions endpoint receives a whole row as token ids and echoes it with the top log-probs at
each position. So the end of a response is scored like any other token, and only one token is
generated, which is discarded. The endpoint must return ids as ``token_id:N`` (vLLM's
``return_tokens_as_token_ids``), since text does not identify a token. The echo is compared with the
row, since nothing else shows that the endpoint read the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.data.best_classes import Best, packed
from kdcore.data.responses.endpoint.client import MALFORMED, EndpointClient
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.specs.parts.endpoint import EndpointSpec

if TYPE_CHECKING:
    import openai

_ID = "token_id:"
MOST_BYTES = 2**28
"""Size of a response with the log-probs of a row, about 40 bytes each."""


class EndpointLogprobs:
    """The log-probs of the top tokens from an endpoint.

    Attributes:
        spec: The endpoint.
        k: Number of tokens per position.
        classes: Number of classes V of the student.
        setting: The option or field that sets k, in messages.
        client: The client of the endpoint.

    Raises:
        UserError: The client library is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(self, spec: EndpointSpec, k: int, classes: int, setting: str = "--k") -> None:
        self.spec, self.k, self.classes, self.setting = spec, k, classes, setting
        self.client = EndpointClient(spec, MOST_BYTES)

    def best(self, rows: Sequence[Row], at_once: int) -> Iterator[tuple[int, Best]]:
        """Request the top classes of rows.

        Args:
            rows: The rows.
            at_once: Maximum number of concurrent requests.

        Yields:
            The index of a row and the top classes at its learned positions, in the order of
            completion.

        Raises:
            UserError: The endpoint cannot be reached, or does not return the required log-probs.
        """
        requests = [partial(self._row, place, row) for place, row in enumerate(rows)]
        yield from self.client.each(requests, at_once)

    async def _row(self, place: int, row: Row, client: openai.AsyncOpenAI) -> tuple[int, Best]:
        ids = [int(row.inputs["input_ids"][0]), *row.labels.tolist()]
        return place, await self.score(ids, row.mask.nonzero()[:, 0].tolist(), client)

    async def score(
        self, ids: Sequence[int], learned: Sequence[int], client: openai.AsyncOpenAI
    ) -> Best:
        """Request the top classes at some positions of a row.

        Args:
            ids: The T + 1 tokens of the row.
            learned: N positions; position t predicts token t + 1.
            client: A client of the endpoint.

        Returns:
            The top classes at these positions.

        Raises:
            UserError: The endpoint cannot be reached, or does not return the required log-probs.
        """
        tokens, scored = await self._echoed(list(ids), client)
        try:
            self._refuse_other_tokens(tokens, ids)
            # Position t predicts token t + 1 of the row, which carries the log-probs.
            return packed(*self._likeliest([scored[t + 1] for t in learned]))
        except MALFORMED as fault:
            raise self.client.alien() from fault

    async def tokens_of(self, text: str, client: openai.AsyncOpenAI) -> list[int]:
        """Request the endpoint's tokens of a text, without those that a tokenizer adds to it.

        Args:
            text: The text.
            client: A client of the endpoint.

        Returns:
            Token ids.

        Raises:
            UserError: As for `score`.
        """
        tokens, _ = await self._echoed(text, client)
        try:
            self._refuse_texts(tokens)
            return [_id(token) for token in tokens[:-1]]  # the last one is generated
        except MALFORMED as fault:
            raise self.client.alien() from fault

    async def _echoed(self, prompt: Any, client: openai.AsyncOpenAI) -> tuple[Any, Any]:
        """The tokens of a prompt and one more, and the top log-probs at each."""
        found: Any = await self.client.answer(
            client,
            lambda: client.completions.create(
                model=self.spec.model,
                prompt=prompt,
                echo=True,
                logprobs=self.k,
                max_tokens=1,  # some servers reject 0
                temperature=1.0,
                extra_body={"return_tokens_as_token_ids": True, "add_special_tokens": False},
            ),
            lambda completion: completion.choices[0].logprobs,
            self._refuse_too_many,
        )
        tokens, scored = getattr(found, "tokens", None), getattr(found, "top_logprobs", None)
        if not tokens or not scored:
            raise UserError(
                f"{self.spec.endpoint} does not echo the log-probs of the prompt",
                "use a server whose completions endpoint echoes them, such as vLLM",
            )
        return tokens, scored

    def _refuse_too_many(self, fault: openai.APIError) -> bool:
        """Explain a server's limit of log-probs; False for any other error."""
        told = self.client.reason(fault)
        if getattr(fault, "status_code", None) != 400 or "logprobs" not in told:
            return False
        most = re.search(r"max allowed: (\d+)", told)
        raise UserError(
            f"{self.spec.endpoint} does not return the log-probs of {self.k} tokens: {told}",
            f"lower {self.setting}{f' to {most[1]}' if most else ''}, or let the server return "
            f"more (vLLM: --max-logprobs {self.k})",
        )

    def _likeliest(self, scored: Sequence[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Ids and log-probs, [N, k] each, the most likely first."""
        fewest = min(map(len, scored))
        if fewest < self.k:
            raise UserError(
                f"{self.spec.endpoint} returns the log-probs of {fewest} tokens, but "
                f"{self.setting} is {self.k}",
                f"lower {self.setting} to {max(fewest, 2)}, or let the server return more (vLLM: "
                f"--max-logprobs {self.k})",
            )
        pairs = [
            sorted(((logp, _id(name)) for name, logp in each.items()), reverse=True)[: self.k]
            for each in scored
        ]
        ids = torch.tensor([[token for _, token in pair] for pair in pairs])
        if int(ids.max()) >= self.classes:
            raise UserError(
                f"{self.spec.model} returns token id {int(ids.max())}, but the student has "
                f"{self.classes} tokens",
                "choose a student with the endpoint's vocabulary",
            )
        best = torch.tensor([[logp for logp, _ in pair] for pair in pairs])
        if int(ids.min()) < 0 or not (best.exp().sum(-1) < 1.01).all():  # nor where it is NaN
            raise UserError(
                f"{self.spec.endpoint} returns invalid log-probs: a negative token id, or "
                "probabilities that sum to more than 1",
                "check the top_logprobs that the server returns",
            )
        return ids, best

    def _refuse_texts(self, echoed: Sequence[str]) -> None:
        if not all(token.startswith(_ID) for token in echoed):
            raise UserError(
                f"{self.spec.endpoint} returns tokens as text, which does not identify them",
                "use a server that supports return_tokens_as_token_ids, such as vLLM",
            )

    def _refuse_other_tokens(self, echoed: Sequence[str], sent: Sequence[int]) -> None:
        self._refuse_texts(echoed)
        if [_id(token) for token in echoed[: len(sent)]] != list(sent):
            raise UserError(
                f"{self.spec.model} reads different tokens than it was sent",
                "use a model with the student's tokenizer, served without an added token at the "
                "beginning",
            )


def _id(token: str) -> int:
    return int(token.removeprefix(_ID))
