"""Shaping of the target's logits, and sampling from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdcore.method.records import LOG_ZERO
from kdcore.models.device import widened

COLDEST = 1e-30
"""Minimum temperature, at which sampling is greedy; below it, scores would overflow."""


class Shaping(Protocol):
    """The processing of the target's logits before the choice of the next token."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen, rather than sampled."""

    def logp(self, logits: Tensor, contexts: Callable[[], Tensor]) -> Tensor:
        """The log-probs of the next token.

        Args:
            logits: [R, V] logits of the target.
            contexts: A function that returns [R, L] int64, the tokens before each row, in which
                tokens may be repeated; called only when a setting depends on them.

        Returns:
            [R, V] float32 log-probs, at least `LOG_ZERO`; some of a row are NaN if its logits
            contain NaN or infinity, or exclude every token.
        """


@dataclass(frozen=True, slots=True)
class Processed:
    """A `Shaping` by logits processors of transformers.

    The processors know which tokens came before, but not their order, so the repetition penalty is
    the only supported processor that reads them.

    Attributes:
        processors: The processors, in order.
        greedy: Whether the most likely token is chosen.
    """

    processors: LogitsProcessorList
    greedy: bool

    def logp(self, logits: Tensor, contexts: Callable[[], Tensor]) -> Tensor:
        """See `Shaping.logp`."""
        looks = any(isinstance(each, RepetitionPenaltyLogitsProcessor) for each in self.processors)
        before: Any = contexts() if looks else torch.LongTensor()
        scores: Tensor = self.processors(before, logits.float())
        if self.greedy:
            best = scores.max(-1, keepdim=True)
            zero = best.values - best.values  # NaN unless the best score is finite
            return torch.full_like(scores, LOG_ZERO).scatter_(-1, best.indices, zero)
        return scores.log_softmax(-1).clamp(min=LOG_ZERO)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A `Shaping` by the settings of ``generate`` in transformers, in the same order.

    Attributes:
        temperature: Sampling temperature; 0 means greedy, regardless of top_k and top_p.
        top_k: Number of tokens to sample from; 0 means all.
        top_p: Nucleus sampling threshold; 1 means all tokens.
        repetition_penalty: Penalty of tokens in the prompt and the answer; 1 means none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the temperature is 0."""
        return self.temperature == 0

    def logp(self, logits: Tensor, contexts: Callable[[], Tensor]) -> Tensor:
        """See `Shaping.logp`."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.greedy:
            processors += self._warpers()
        return Processed(processors, self.greedy).logp(logits, contexts)

    def warped(self, scores: Tensor) -> Tensor:
        """Apply temperature, top_k and top_p.

        Args:
            scores: [R, V] logits; the temperature must be above 0.

        Returns:
            [R, V] logits, with -inf for excluded tokens.
        """
        warped: Tensor = self._warpers()(torch.LongTensor(), scores)
        return warped

    def _warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(max(self.temperature, COLDEST)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


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
