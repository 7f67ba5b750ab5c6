"""A teacher behind servers, which score the rows of coming steps while the student trains.

Each row is scored as `kdcore.data.responses.endpoint.logprobs` does for a teacher cache, and
rounded as the cache stores it, so both teach the same. A request goes to the server that works on
the fewest; one that does not answer rests, while the others take its requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.data.best_classes import Best, CachedLogits, refuse_more_classes
from kdcore.data.conversation import Conversation
from kdcore.data.responses.endpoint.answers import chat_of
from kdcore.data.responses.endpoint.client import RequestLoop, Unavailable
from kdcore.data.responses.endpoint.logprobs import EndpointLogprobs
from kdcore.data.templates.mask import prompt_ids
from kdcore.data.templates.rendering import prints_date
from kdcore.errors import UserError, in_field
from kdcore.method.objective import Objective
from kdcore.method.records import Batch
from kdcore.models.device import sent
from kdcore.runs.today import today
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.teachers import ServedTeacherSpec

if TYPE_CHECKING:
    import openai

_LONGEST_REST = 15.0
"""Seconds after which a server that did not answer is tried again, at most."""
_PROBE = "A probe: naïve café, 3.14159 % of 漢字\n\tdef f(x): return x ** 2  # 🙂"
"""Text that tokenizers of different families split differently."""

_Asked = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a row, and its learned positions."""


@dataclass(eq=False)
class _Server:
    """A server of the teacher.

    Attributes:
        scorer: The requests to it.
        client: The connection.
        busy: Number of its pending requests.
        failures: Number of failures since its last response.
        resumes: Time before which it is not asked.
    """

    scorer: EndpointLogprobs
    client: openai.AsyncOpenAI
    busy: int = 0
    failures: int = 0
    resumes: float = 0.0

    def rest(self) -> None:
        """Leave the server alone for a while, longer after each failure.

        Requests that fail while it is left alone were sent before: they are the same failure.
        """
        now = time.monotonic()
        if self.resumes > now:
            return
        self.failures += 1
        self.resumes = now + min(0.25 * 2**self.failures, _LONGEST_REST)


class ServedTeacher:
    """The top classes of a served teacher at the learned positions of rows.

    Args:
        spec: The servers.
        classes: Number of classes V of the student.
        note: Receiver of a line for each failure of a server.

    Attributes:
        waited: Seconds since the last call of `pop_waited` in which the training waited.

    Raises:
        UserError: The client library is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(self, spec: ServedTeacherSpec, classes: int, note: Callable[[str], None]) -> None:
        self.spec, self.classes, self._note = spec, classes, note
        self._loop = RequestLoop(spec.concurrency)
        self._servers = []
        for url in (spec.endpoint, *spec.replicas):
            one = EndpointSpec(endpoint=url, model=spec.model, key=spec.key, timeout=spec.timeout)
            scorer = EndpointLogprobs(one, min(spec.k, classes), classes, "teacher.k")
            self._servers.append(_Server(scorer, scorer.client.connect(retries=0)))
        self._pending: dict[_Asked, Future[Best]] = {}
        self._waited = 0.0

    def request(self, padded: Mapping[str, Tensor]) -> None:
        """Start to score the rows of a batch that training reads later.

        Args:
            padded: The batch as `kdcore.data.rows.collate` makes it.
        """
        tokens, attended = padded["input_ids"], padded.get("attention_mask")
        first = _first(tokens, padded.get("starts"))
        for row in _rows(first, padded["labels"], padded["mask"], attended):
            self._started(row)

    def logits(self, batch: Batch) -> CachedLogits:
        """The teacher's logits at the learned positions of a batch, row by row.

        Args:
            batch: The batch; rows that were not requested before are requested now.

        Returns:
            The logits of all N positions.

        Raises:
            UserError: No server answered within ``timeout``, or a response cannot be used.
        """
        began = time.monotonic()
        here = batch.on_cpu or batch
        first = _first(here.inputs["input_ids"], here.starts)
        rows = _rows(first, here.labels, here.mask, here.inputs.get("attention_mask"))
        best = [future.result() for future in [self._started(row) for row in rows]]
        for row in rows:
            self._pending.pop(row, None)
        self._waited += time.monotonic() - began
        device = batch.mask.device
        ids, logp, tail = (torch.cat(parts) for parts in zip(*best, strict=True))
        return CachedLogits(
            sent(ids, device), sent(logp.float(), device), sent(tail.float(), device), self.classes
        )

    def pop_waited(self) -> float:
        """The seconds that the training waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    @in_field("teacher.k")
    def refuse_method(self, objective: Objective) -> None:
        """Check that the requested classes are enough for the components of a method.

        Args:
            objective: The method.

        Raises:
            UserError: A component needs more of the teacher's classes.
        """
        refuse_more_classes(
            objective,
            min(self.spec.k, self.classes),
            self.classes,
            f"teacher.k requests only from {self.spec.endpoint}",
            "raise teacher.k (vLLM: --max-logprobs too), use a teacher on this machine",
        )

    def refuse_other_text(
        self, tokenizer: Any, examples: Sequence[Any], arguments: Mapping[str, Any]
    ) -> None:
        """Check that every server has the student's tokenizer, its chat template and k log-probs.

        Args:
            tokenizer: The student's tokenizer, which encodes the rows.
            examples: The examples of the rows; the first chat is compared.
            arguments: Arguments of the chat template in the spec.

        Raises:
            UserError: A server cannot be reached, or encodes a text or a chat differently.
        """
        chats = (e for e in examples if isinstance(e, Conversation) and not e.plain)
        chat = next(chats, None)
        if prints_date(tokenizer) and today().date().isoformat() != time.strftime("%Y-%m-%d"):
            chat = None  # a resumed run keeps its date, and a server prints today's
        for server in self._servers:
            self._loop.submit(partial(self._check, server, tokenizer, chat, arguments)).result()

    def close(self) -> None:
        """End the connections, and cancel pending requests."""
        self._loop.close(*(server.client for server in self._servers))

    def _started(self, row: _Asked) -> Future[Best]:
        if row not in self._pending:
            self._pending[row] = self._loop.submit(partial(self._scored, *row))
        return self._pending[row]

    async def _scored(self, ids: Sequence[int], learned: Sequence[int]) -> Best:
        """Score a row on the least busy server, and on another one if that fails."""
        until = time.monotonic() + self.spec.timeout
        while True:
            now = time.monotonic()
            server = min(self._servers, key=lambda s: (max(s.resumes - now, 0.0), s.busy))
            if server.resumes > now and now < until:
                await asyncio.sleep(min(server.resumes, until) - now)
                continue
            server.busy += 1
            try:
                best = await server.scorer.score(ids, learned, server.client)
            except Unavailable as fault:
                if not server.failures:
                    self._note(f"teacher: {fault.cause}; its requests are sent again")
                server.rest()
                if time.monotonic() > until:
                    raise UserError(
                        f"{fault.cause}, and no server of the teacher has answered for "
                        f"{self.spec.timeout:g} s",
                        "start the server, then rerun with --resume",
                    ) from fault
            else:
                server.failures = 0
                return best
            finally:
                server.busy -= 1

    async def _check(
        self, server: _Server, tokenizer: Any, chat: Conversation | None, arguments: Any
    ) -> None:
        place = server.scorer.spec.endpoint
        ours = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        theirs = await server.scorer.tokens_of(_PROBE, server.client)
        if theirs != ours:
            raise UserError(
                f"{place} encodes a text by another tokenizer than the student's: it has "
                f"{len(theirs)} tokens there and {len(ours)} here",
                "choose a student of the teacher's family",
            )
        if chat is None:
            return
        asked = _prompt_request(self.spec, chat, arguments)
        read = await server.scorer.client.answer(
            server.client,
            lambda: server.client.chat.completions.create(**asked),
            _prompt_of,
            lambda fault: getattr(fault, "status_code", None) in (400, 404, 501),
        )
        if read is None:
            self._note(
                f"teacher: {place} does not return the tokens of a chat, so its chat template was "
                "not compared with the student's"
            )
        elif read != prompt_ids(chat, tokenizer):
            raise UserError(
                f"{place} renders chats by another template than the student's, e.g. {chat.id}",
                "set student.template to the server's template, or start the server with the "
                "student's (vLLM: --chat-template)",
            )


def _prompt_request(
    spec: ServedTeacherSpec, chat: Conversation, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """A request that returns the tokens of a chat's first prompt."""
    asked = chat_of(chat.questions(), arguments)
    extra = {**asked.pop("extra_body", {}), "return_token_ids": True}
    return {"model": spec.model, "max_tokens": 1, "temperature": 0.0, "extra_body": extra, **asked}


def _prompt_of(completion: Any) -> list[Any] | None:
    """The tokens of the prompt; None if the server does not return them."""
    found = getattr(completion, "prompt_token_ids", None)
    return None if found is None else list(found)


def _first(tokens: Tensor, starts: Tensor | None) -> Tensor:
    """[B] the first token of each row, which may be packed."""
    return tokens[:, 0] if starts is None else tokens.flatten()[starts]


def _rows(first: Tensor, labels: Tensor, mask: Tensor, attended: Tensor | None) -> list[_Asked]:
    """The tokens and the learned positions of each row of a batch on the CPU."""
    found = []
    for place, learned in enumerate(mask):
        at = learned.nonzero()[:, 0].tolist()
        length = at[-1] + 1 if attended is None else int(attended[place].sum())
        ids = (int(first[place]), *labels[place, :length].tolist())
        found.append((ids, tuple(at)))
    return found
