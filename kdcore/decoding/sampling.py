"""How the target's next token is drawn from its logits."""

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
"""A temperature at which the likeliest is certain; below it, scores would overflow."""


class Shaping(Protocol):
    """What is done to the target's logits before its next token is chosen."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest is chosen, rather than one drawn."""

    def logp(self, logits: Tensor, contexts: Callable[[], Tensor]) -> Tensor:
        """[R, V] float32 log-probs of the next token, at least `LOG_ZERO`.

        logits: [R, V] of the target. contexts: gives [R, L] int64, the tokens before each; asked
        only when a setting depends on them. A token may stand there more than once.
        """


@dataclass(frozen=True, slots=True)
class Processed:
    """A `Shaping` by transformers' processors, in their order.

    Each sees which tokens came before, not where: of those that look, only the repetition penalty
    can be among them.
    """

    processors: LogitsProcessorList
    greedy: bool

    def logp(self, logits: Tensor, contexts: Callable[[], Tensor]) -> Tensor:
        """See `Shaping.logp`."""
        looks = any(isinstance(each, RepetitionPenaltyLogitsProcessor) for each in self.processors)
        before: Any = contexts() if looks else torch.LongTensor()
        scores: Tensor = self.processors(before, logits.float())
        if self.greedy:
            certain = torch.full_like(scores, LOG_ZERO)
            return certain.scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)
        return scores.log_softmax(-1).clamp(min=LOG_ZERO)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A `Shaping` by the settings of transformers' ``generate``: same names, same order.

    temperature: 0 is greedy, whatever top_k and top_p. top_k: 0 keeps all; top_p: 1 keeps all.
    repetition_penalty: of each token of the prompt and of what follows it; 1 is none.
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
        """[R, V] ``scores`` at the temperature, above 0, with -inf for what is cut off."""
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
    """One class [...] for each distribution [..., V], which need not sum to 1.

    By the inverse of the cumulative sum: one random number each, where torch.multinomial draws V.
    """
    reached = widened(probs).cumsum(-1)
    total = reached[..., -1:]
    share = torch.rand(total.shape, generator=generator, dtype=total.dtype, device=total.device)
    return torch.searchsorted(reached, share * total, right=True).squeeze(-1)
