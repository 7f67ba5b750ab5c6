"""Shaping of the target's logits, and sampling from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kdcore.decoding.processors import Contexts, Processed, log_probs
from kdcore.models.device import widened

COLDEST = 1e-30
"""Minimum temperature, at which sampling is greedy; below it, scores would overflow."""


class Shaping(Protocol):
    """The processing of the target's logits before the choice of the next token."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen, rather than sampled."""

    @property
    def ordered(self) -> bool:
        """Whether the order of the tokens before matters.

        Then it is not called for a context that contains a token which it excludes.
        """

    def scores(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """The processed logits.

        Args:
            logits: [R, V] logits of the target.
            contexts: A function that returns the tokens before; called only when a setting depends
                on them.

        Returns:
            [R, V] float32, with -inf for excluded tokens.
        """

    def logp(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """The log-probs of the next token.

        Args:
            logits: [R, V] logits of the target.
            contexts: As for `scores`.

        Returns:
            [R, V] float32 log-probs, at least `LOG_ZERO`; some of a row are NaN if its logits
            contain NaN or infinity, or exclude every token.
        """


@dataclass(frozen=True, slots=True)
class Sampling:
    """A `Shaping` by the settings of ``generate`` in transformers, in the same order.

    Attributes:
        temperature: Sampling temperature; 0 means greedy, regardless of the next four.
        top_k: Number of tokens to sample from; 0 means all.
        top_p: Nucleus sampling threshold; 1 means all tokens.
        min_p: Least probability of a token, relative to the most likely one; 0 means none.
        typical_p: Threshold of locally typical sampling; 1 means all tokens.
        repetition_penalty: Penalty of tokens in the prompt and the answer; 1 means none.
        presence_penalty: Reduction of the logits of tokens in the answer; 0 means none.
        frequency_penalty: The same for each time that the token occurs in the answer.
        min_new_tokens: Minimum length of the answer, before which ``ends`` are excluded.
        ends: Ids of end tokens.
        processors: Processors that read the tokens before without padding, such as for bad words.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the temperature is 0."""
        return self.temperature == 0

    @property
    def ordered(self) -> bool:
        """Whether there are ``processors``."""
        return bool(self.processors)

    def scores(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """See `Shaping.scores`."""
        scores = Processed(self.processors, self.greedy).scores(logits, contexts)
        if self.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
            scores = penalty(contexts().bag(), scores)
        if self.presence_penalty or self.frequency_penalty:
            counts = contexts().counts(scores.shape[-1])
            scores = scores - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
        if self.min_new_tokens and self.ends:
            known = contexts()
            early = known.lengths - known.prompts < self.min_new_tokens
            ends = torch.zeros_like(scores[0], dtype=torch.bool)
            ends[list(self.ends)] = True
            scores = scores.masked_fill(early[:, None] & ends, -torch.inf)
        return scores if self.greedy else self.warped(scores)

    def logp(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """See `Shaping.logp`."""
        return log_probs(self.scores(logits, contexts), self.greedy)

    def warped(self, scores: Tensor) -> Tensor:
        """Apply temperature, top_k, top_p, min_p and typical_p.

        Args:
            scores: [R, V] logits; the temperature must be above 0.

        Returns:
            [R, V] logits, with -inf for excluded tokens.
        """
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(max(self.temperature, COLDEST)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            warpers.append(TypicalLogitsWarper(self.typical_p))
        none: Any = torch.LongTensor()
        warped: Tensor = warpers(none, scores)
        return warped


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample by inverting the cumulative sum.

    That takes one random number per distribution, where torch.multinomial takes V.

    Args:
        probs: [..., V] distributions, which need not sum to 1.
        generator: Generator on their device (default: torch's own).

    Returns:
        [...] int64 classes.
    """
    reached = widened(probs).cumsum(-1)
    total = reached[..., -1:]
    share = torch.rand(total.shape, generator=generator, dtype=total.dtype, device=total.device)
    found = torch.searchsorted(reached, share * total, right=True).squeeze(-1)
    return found.clamp(max=probs.shape[-1] - 1)  # beyond it for NaN
