"""Answers to conversations: one as it comes, or many at once, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from kdcore.data.conversation import Conversation, Message
from kdcore.data.template_mask import prompt_ids
from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore.models.facts import end_ids, refuse_crossing
from kdcore.models.loaded import LoadedModel

APART = 1_000_003
"""Between the seeds of a conversation's turns. A file's prompts count theirs up by one."""


@dataclass(frozen=True, slots=True)
class DecoderAnswers:
    """Puts a target's conversations to a decoder of that target.

    max_new_tokens: the longest answer; a shorter one where the context ends before.
    stop_strings: end an answer, which they are part of; what a token says after one is not.
    seed: of what is sampled.
    """

    target: LoadedModel
    decoder: Decoder
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def prompt(self, conversation: Conversation) -> list[int]:
        """The tokens before the answer that a conversation lacks.

        Raises UserError when there are none or they come of no text, when they leave no room in
        the context, as `refuse_crossing` does, or when the chat template is missing or refuses
        them.
        """
        ids = prompt_ids(conversation, self.target.tokenizer)
        if not ids:
            raise UserError(
                f"{conversation.id} is empty", "write at least one word for the model to go on from"
            )
        if self._room(ids) < 1:
            raise UserError(
                f"{conversation.id} has {len(ids)} tokens, and the model's context "
                f"{self.decoder.session.limit}",
                "shorten it, or choose a model with a longer context",
            )
        longest = int(min(self.max_new_tokens, self._room(ids)))
        refuse_crossing(self.decoder.session.short, len(ids), longest, conversation.id)
        return ids

    def stream(self, conversation: Conversation) -> Iterator[list[int]]:
        """The tokens of one answer, as each round commits them.

        What is drawn depends on the seed and on how many answers came before.
        Raises UserError as `prompt` does, before the first is asked for.
        """
        prompt = self.prompt(conversation)
        before = sum(message.role == "assistant" for message in conversation.messages)
        generator = self._seeded(self.seed + APART * before)
        return (tokens for (tokens,) in self._run([prompt], generator))

    def answer(self, asked: Sequence[Conversation], seed: int) -> list[Conversation]:
        """All turns of several conversations, answered together; in their order.

        A turn is left unanswered when the turns before it have used the context up. All that is
        sampled is drawn one after the other, so that no two turns or rows draw alike.
        """
        done = list(asked)
        generator = self._seeded(seed)
        waiting = [place for place, each in enumerate(done) if each.needs_response]
        while waiting:
            prompts = {place: self.prompt(done[place]) for place in waiting}
            for places in self._together(prompts):
                rows: list[list[int]] = [[] for _ in places]
                for emitted in self._run([prompts[place] for place in places], generator):
                    for row, tokens in zip(rows, emitted, strict=True):
                        row += tokens
                for place, row in zip(places, rows, strict=True):
                    done[place] = done[place].answered(self.message(row))
            waiting = [place for place in waiting if self._goes_on(done[place])]
        return done

    def message(self, tokens: Sequence[int]) -> Message:
        """An answer's tokens as a turn of the conversation."""
        text = str(self.target.tokenizer.decode(list(tokens), skip_special_tokens=True))
        ended = bool(tokens) and tokens[-1] in end_ids(self.target)
        return Message("assistant", self.until_stop(text), ended)

    def until_stop(self, text: str) -> str:
        """An answer's text up to the end of the stop string that ends first; all where none is."""
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
        """Those that may have their full length in one batch, and every other alone.

        So that none is cut short because it stood beside a longer one.
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
    """Ids and mask [B, T], padded on the right."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = 1
    return ids, real
