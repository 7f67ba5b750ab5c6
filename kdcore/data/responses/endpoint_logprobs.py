"""The best classes at the learned positions of rows, from an endpoint that scores given tokens.

A row is sent whole, as token ids, to the completions endpoint, which echoes it with the log-probs
of the likeliest tokens at each place: so the end of a response is scored like any other token, and
nothing is generated but one token that is thrown away. The ids come back as ``token_id:N``, which
an endpoint must be able to do (``return_tokens_as_token_ids``, vLLM's): text would not say which
token it is. There is no other sign that the endpoint reads what was sent, so the echo is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.data.best_classes import Best, packed
from kdcore.data.responses.endpoint_client import EndpointClient
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.specs.generate_data import EndpointSpec

if TYPE_CHECKING:
    import openai

_ID = "token_id:"


class EndpointLogprobs:
    """Asks for the log-probs of the ``k`` likeliest of ``classes`` tokens.

    Raises UserError when the client library or the variable that holds the key is missing.
    """

    def __init__(self, spec: EndpointSpec, k: int, classes: int, at_once: int) -> None:
        self.spec, self.k, self.classes, self.at_once = spec, k, classes, at_once
        self._client = EndpointClient(spec)

    def best(self, rows: Sequence[Row]) -> Iterator[tuple[int, Best]]:
        """(place, best classes at its learned positions) of each row, as they come in.

        Raises UserError when the endpoint cannot be asked, or does not give what is needed.
        """
        requests = [partial(self._row, place, row) for place, row in enumerate(rows)]
        yield from self._client.each(requests, self.at_once)

    async def _row(self, place: int, row: Row, client: openai.AsyncOpenAI) -> tuple[int, Best]:
        ids = [int(row.inputs["input_ids"][0]), *row.labels.tolist()]
        try:
            completion = await client.completions.create(
                model=self.spec.model,
                prompt=ids,
                echo=True,
                logprobs=self.k,
                max_tokens=1,  # none is refused by some
                temperature=1.0,
                extra_body={"return_tokens_as_token_ids": True},
            )
            found: Any = completion.choices[0].logprobs
        except self._client.openai.APIError as fault:
            raise await self._client.told(client, fault) from fault
        except (AttributeError, IndexError, TypeError) as fault:
            raise self._client.alien() from fault
        tokens, scored = getattr(found, "tokens", None), getattr(found, "top_logprobs", None)
        if not tokens or not scored:
            raise UserError(
                f"{self.spec.endpoint} does not echo the log-probs of what it is sent",
                "ask a server whose completions endpoint does, such as vLLM's",
            )
        learned = row.mask.nonzero()[:, 0].tolist()
        try:
            self._refuse_other_tokens(tokens, ids)
            # Position t predicts the token at t + 1 of the row, beside which the log-probs stand.
            return place, packed(*self._likeliest([scored[t + 1] for t in learned]))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as fault:
            raise self._client.alien() from fault

    def _likeliest(self, scored: Sequence[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Ids and log-probs [N, k], the likeliest first."""
        fewest = min(map(len, scored))
        if fewest < self.k:
            raise UserError(
                f"{self.spec.endpoint} gives the log-probs of {fewest} tokens, and {self.k} are "
                "to be kept",
                f"keep fewer (--k {max(fewest, 2)}), or let the server give more (vLLM: "
                "--max-logprobs)",
            )
        pairs = [
            sorted(((logp, _id(name)) for name, logp in each.items()), reverse=True)[: self.k]
            for each in scored
        ]
        ids = torch.tensor([[token for _, token in pair] for pair in pairs])
        if int(ids.max()) >= self.classes:
            raise UserError(
                f"{self.spec.model} knows token {int(ids.max())}, and the student has "
                f"{self.classes}",
                "choose a student of the endpoint's vocabulary",
            )
        best = torch.tensor([[logp for logp, _ in pair] for pair in pairs])
        if int(ids.min()) < 0 or not (best.exp().sum(-1) < 1.01).all():  # nor where it is NaN
            raise UserError(
                f"{self.spec.endpoint} gives log-probs that cannot be: of no token, or of "
                "probabilities that add up to more than 1",
                "look at what the server returns as top_logprobs",
            )
        return ids, best

    def _refuse_other_tokens(self, echoed: Sequence[str], sent: Sequence[int]) -> None:
        if not all(token.startswith(_ID) for token in echoed):
            raise UserError(
                f"{self.spec.endpoint} gives tokens as text, which does not say which they are",
                "ask a server that knows return_tokens_as_token_ids, such as vLLM's",
            )
        if [_id(token) for token in echoed[: len(sent)]] != list(sent):
            raise UserError(
                f"{self.spec.model} reads other tokens than it is sent",
                "name a model whose tokenizer is the student's, served without a token of its own "
                "at the beginning",
            )


def _id(token: str) -> int:
    return int(token.removeprefix(_ID))
