"""Shaping of the target's logits, at the slots of a draft tree, and sampling from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from kdcore.decoding.tree import DraftTree
from kdcore.method.records import LOG_ZERO
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


@dataclass(slots=True)
class ShapedLogits:
    """The target's log-probs for a `Verifier`, shaped only for the slots that it requests.

    Attributes:
        sampling: The shaping.
        logits: [B, 1 + N, V] logits of the target.
        committed: [B, L] int64 tokens of each row.
        lengths: [B] int64, their numbers.
        prompts: [B] int64, how many of them are the prompt's.
        going: [B] bool, whether the row is not done.
        ends: [E] int64 end tokens.
        tree: The draft tree.
        faulty: [B] bool, whether log-probs were NaN.
    """

    sampling: Shaping
    logits: Tensor
    committed: Tensor
    lengths: Tensor
    prompts: Tensor
    going: Tensor
    ends: Tensor
    tree: DraftTree
    faulty: Tensor = field(init=False)
    _levels: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.faulty = torch.zeros_like(self.lengths, dtype=torch.bool)

    def __call__(self, slots: Tensor) -> Tensor:
        """The log-probs [B, M, V] after slots [B, M]; see `kdcore.decoding.protocols.Verifier`."""
        rows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
        if self.sampling.ordered:
            if self._levels is None:
                self._levels = self._by_level()
            shaped = self._levels[rows, slots]
        else:
            shaped = self._logp(rows.flatten(), slots.flatten()).view(*slots.shape, -1)
        self.faulty |= shaped.amax(-1).isnan().any(1)
        return shaped

    def scores(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Read the logits and the processed logits.

        Args:
            rows: [R] int64.
            slots: [R] int64, a slot of each of these rows.

        Returns:
            [R, V] each.
        """
        logits = self.logits[rows, slots]
        return logits, self.sampling.scores(logits, lambda: self._contexts(rows, slots))

    def _logp(self, rows: Tensor, slots: Tensor) -> Tensor:
        return self.sampling.logp(self.logits[rows, slots], lambda: self._contexts(rows, slots))

    def _by_level(self) -> Tensor:
        """The log-probs of the slots that can be reached; 0 at the others.

        A processor may fail for a context with a token that it excludes, or after the end.
        """
        shape, tokens = self.tree.shape, self.tree.tokens
        depth = shape.depth.expand(len(tokens), -1)
        above = shape.parents.expand_as(tokens) + 1
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        found = torch.zeros_like(self.logits, dtype=torch.float32)
        reached = (depth == 0) & self.going[:, None]
        open_ended = self.tree.mask & ~torch.isin(tokens, self.ends)
        for level in range(shape.levels + 1):
            at = (reached & (depth == level)).nonzero(as_tuple=True)
            if not len(at[0]):
                break
            found[at] = self._logp(*at)
            allowed = found[rows, above, tokens] > LOG_ZERO
            deeper = depth[:, 1:] == level + 1
            reached[:, 1:] |= open_ended & deeper & reached.gather(1, above) & allowed
        return found

    def _contexts(self, rows: Tensor, slots: Tensor) -> Contexts:
        """The tokens before slots [R] of rows [R]: the committed ones and the path to the slot."""
        shape, lengths = self.tree.shape, self.lengths[rows]
        depth = shape.depth.expand(len(self.lengths), -1)[rows]
        sees = shape.sees.expand(len(self.lengths), -1, -1)[rows, slots, 1:]
        committed = self.committed[rows]
        room = committed.new_zeros(len(rows), shape.levels + 1)
        tokens = torch.cat([committed, room], dim=1)
        beyond = tokens.shape[1] - 1
        places = torch.where(sees, lengths[:, None] + depth[:, 1:] - 1, beyond)
        tokens.scatter_(1, places, self.tree.tokens[rows])
        own = depth.gather(1, slots[:, None])[:, 0]
        return Contexts(tokens, lengths + own, self.prompts[rows], rows)


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
