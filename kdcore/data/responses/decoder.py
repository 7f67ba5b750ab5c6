"""Answers to conversations by a `Decoder`: one streamed, or many in a batch, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.model import generated_message
from kdcore.data.templates.mask import digest_of, prompt_ids
from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore.models.facts import end_ids, refuse_crossing
from kdcore.models.loading.loaded import LoadedModel

APART = 1_000_003
"""Step between the seeds of a conversation's turns; the prompts of a file step by one."""


@dataclass(frozen=True, slots=True)
class DecoderAnswers:
    """The answers of a target to conversations.

    Attributes:
        target: The target.
        decoder: A decoder of that target.
        max_new_tokens: Maximum length of an answer, reduced where the context ends earlier.
        stop_strings: Strings that end an answer. An answer includes its stop string, but not the
            text after it within the same token.
        seed: Sampling seed.
    """

    target: LoadedModel
    decoder: Decoder
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def prompt(self, conversation: Conversation) -> list[int]:
        """The generation prompt of the first missing answer.

        Args:
            conversation: The conversation.

        Returns:
            Token ids.

        Raises:
            UserError: The prompt is empty, invalid, or too long for the context; the chat
                template is missing or rejects the conversation; or decoding could cross the
                factors of LongRoPE (`kdcore.models.facts.refuse_crossing`).
        """
        ids = prompt_ids(conversation, self.target.tokenizer)
        if not ids:
            raise UserError(
                f"{conversation.id} is empty", "write at least one word for the model to continue"
            )
        if self._room(ids) < 1:
            raise UserError(
                f"{conversation.id} has {len(ids)} tokens, but the context of the model is "
                f"{self.decoder.session.limit}",
                "shorten it, or choose a model with a longer context",
            )
        longest = int(min(self.max_new_tokens, self._room(ids)))
        refuse_crossing(self.decoder.session.short, len(ids), longest, conversation.id)
        return ids

    def stream(self, conversation: Conversation, samples: int = 1) -> Iterator[list[list[int]]]:
        """Stream the tokens of one answer or of several independent ones, round by round.

        The sampled tokens depend on the seed, on the number of earlier answers and on ``samples``.

        Args:
            conversation: The conversation.
            samples: Number of answers.

        Returns:
            An iterator over the tokens that each round commits for each answer.

        Raises:
            UserError: As for `prompt`, before the iteration starts.
        """
        prompt = self.prompt(conversation)
        before = sum(message.role == "assistant" for message in conversation.messages)
        generator = self._seeded(self.seed + APART * before)
        return self._run([prompt] * samples, generator)

    def answer(self, asked: Sequence[Conversation], seed: int) -> list[Conversation]:
        """Answer all turns of several conversations, in batches.

        A turn remains unanswered when the turns before it fill the context. All turns and rows
        share one generator, so that no two of them sample with the same numbers.

        Args:
            asked: The conversations.
            seed: Sampling seed.

        Returns:
            The answered conversations, in the same order.

        Raises:
            UserError: As for `prompt`.
        """
        done = list(asked)
        generator = self._seeded(seed)
        own = digest_of(self.target.tokenizer)
        waiting = [place for place, each in enumerate(done) if each.needs_response]
        while waiting:
            prompts = {place: self.prompt(done[place]) for place in waiting}
            for places in self._together(prompts):
                rows: list[list[int]] = [[] for _ in places]
                for emitted in self._run([prompts[place] for place in places], generator):
                    for row, tokens in zip(rows, emitted, strict=True):
                        row += tokens
                for place, row in zip(places, rows, strict=True):
                    done[place] = done[place].answered(self.message(row), own)
            waiting = [place for place in waiting if self._goes_on(done[place])]
        return done

    def message(self, tokens: Sequence[int]) -> Message:
        """The assistant turn that an answer's tokens form."""
        said = generated_message(tokens, self.target)
        text = self.until_stop(said.content)
        return said if text == said.content else replace(said, content=text, tokens=())

    def until_stop(self, text: str) -> str:
        """The text up to the end of the first stop string; all of it without a stop string."""
        ends = [text.index(stop) + len(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends, default=None)]

    def _seeded(self, seed: int) -> torch.Generator:
        return torch.Generator(self.target.model.device).manual_seed(seed)

    def _run(
        self, prompts: list[list[int]], generator: torch.Generator
    ) -> Iterator[list[list[int]]]:
        device = self.target.model.device
        ids, real = _padded(prompts)
        longest = max(prompts, key=len)
        stop = Stop(
            int(min(self.max_new_tokens, self._room(longest))),
            tuple(end_ids(self.target)),
            self._criteria(),
        )
        return self.decoder.stream(ids.to(device), real.to(device), stop, generator)

    def _together(self, prompts: dict[int, list[int]]) -> Iterator[list[int]]:
        """One batch of the prompts with room for a full answer, and each other prompt alone.

        So a long prompt does not shorten the answers of the others.
        """
        roomy = [at for at, ids in prompts.items() if self._room(ids) >= self.max_new_tokens]
        if roomy:
            yield roomy
        yield from ([at] for at in prompts if at not in roomy)

    def _goes_on(self, conversation: Conversation) -> bool:
        if not conversation.needs_response:
            return False
        return self._room(prompt_ids(conversation, self.target.tokenizer)) >= 1

    def _room(self, ids: Sequence[int]) -> float:
        limit = self.decoder.session.limit
        return float("inf") if limit is None else limit - len(ids)

    def _criteria(self) -> StoppingCriteriaList | None:
        if not self.stop_strings:
            return None
        tokenizer: Any = self.target.tokenizer
        return StoppingCriteriaList([StopStringCriteria(tokenizer, list(self.stop_strings))])


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T] each, padded on the right."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = 1
    return ids, real
