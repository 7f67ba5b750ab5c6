"""Logits processors of transformers on the nodes of a draft tree, each with its own context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kdcore.errors import first_line
from kdcore.method.records import LOG_ZERO

CONTEXT_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that do not read the tokens before."""
PURE = (
    *CONTEXT_FREE,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
"""Processors that are known to be functions of the tokens before and the logits."""
TRIED = 3
"""Number of further tokens in the trial of another processor."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The tokens before each of R choices of a next token.

    Attributes:
        tokens: [R, L] int64, padded on the right.
        lengths: [R] int64, number of tokens.
        prompts: [R] int64, how many of them are of the prompt.
        rows: [R] int64, index of the row in the batch.
    """

    tokens: Tensor
    lengths: Tensor
    prompts: Tensor
    rows: Tensor

    def bag(self) -> Tensor:
        """The tokens [R, L] without their order, as padding repeats the first one of each."""
        return torch.where(self._places() < self.lengths[:, None], self.tokens, self.tokens[:, :1])

    def counts(self, classes: int) -> Tensor:
        """How often each token occurs after the prompt, [R, V] float."""
        places = self._places()
        new = (places >= self.prompts[:, None]) & (places < self.lengths[:, None])
        empty = torch.zeros(len(new), classes, device=new.device)
        return empty.scatter_add_(1, self.tokens.clamp(max=classes - 1), new.float())

    def groups(self, prompt: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The contexts of equal length, in order. The host waits for the device.

        Args:
            prompt: [B, T] the prompts as the caller padded them, which then replace those without
                padding; or None.

        Yields:
            The places [G] among the R, and their contexts [G, L'].
        """
        new = self.lengths - self.prompts
        sizes = self.lengths if prompt is None else new
        for size in sorted(set(sizes.tolist())):
            places = (sizes == size).nonzero()[:, 0]
            if prompt is None:
                yield places, self.tokens[places, :size]
                continue
            after = self.prompts[places, None] + torch.arange(size, device=new.device)
            own = prompt[self.rows[places]]
            yield places, torch.cat([own, self.tokens[places].gather(1, after)], dim=1)

    def _places(self) -> Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)


@dataclass(frozen=True, slots=True)
class Processed:
    """A `kdcore.decoding.sampling.Shaping` by logits processors of transformers.

    Attributes:
        processors: The processors, in order.
        greedy: Whether the most likely token is chosen.
        prompt: [B, T] the prompts as the caller padded them, for processors that see the padding;
            None for contexts without padding.
    """

    processors: Sequence[LogitsProcessor]
    greedy: bool
    prompt: Tensor | None = None

    @property
    def ordered(self) -> bool:
        """Whether a processor reads the tokens before."""
        return any(type(each) not in CONTEXT_FREE for each in self.processors)

    def scores(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """The processed logits [R, V]; see `kdcore.decoding.sampling.Shaping.scores`."""
        scores = logits.float()
        if not self.ordered:
            none: Any = torch.LongTensor()
            processed: Tensor = LogitsProcessorList(self.processors)(none, scores)
            return processed
        found, known = torch.empty_like(scores), contexts()
        for places, before in known.groups(self.prompt):
            each = scores[places]
            for processor in self.processors:
                each = _call(processor, before, each, known.rows[places])
            found[places] = each
        return found

    def logp(self, logits: Tensor, contexts: Callable[[], Contexts]) -> Tensor:
        """See `kdcore.decoding.sampling.Shaping.logp`."""
        return log_probs(self.scores(logits, contexts), self.greedy)


def log_probs(scores: Tensor, greedy: bool) -> Tensor:
    """The log-probs of processed logits.

    Args:
        scores: [R, V] processed logits.
        greedy: Whether the most likely token is chosen.

    Returns:
        [R, V] float32, at least `LOG_ZERO`, or NaN; see `kdcore.decoding.sampling.Shaping.logp`.
    """
    if greedy:
        best = scores.max(-1, keepdim=True)
        zero = best.values - best.values  # NaN unless the best score is finite
        return torch.full_like(scores, LOG_ZERO).scatter_(-1, best.indices, zero)
    return scores.log_softmax(-1).clamp(min=LOG_ZERO)


def fault_of(processor: Any, prompts: Tensor, classes: int, ends: Sequence[int] = ()) -> str | None:
    """Try whether a processor is a function of the tokens before and the logits.

    It is called with contexts that branch, in two orders, and with single rows. A state that shows
    later, such as after a hundred calls, is not found.

    Args:
        processor: The processor.
        prompts: [B, T] int64 contexts to begin with.
        classes: Width V of the logits.
        ends: Ids of end tokens, after which it is not called.

    Returns:
        What is wrong, as the end of a sentence; None for a function.
    """
    if type(processor) in PURE:
        return None
    device, every = prompts.device, torch.arange(len(prompts), device=prompts.device)
    drawn = torch.randn(len(prompts), classes, generator=torch.Generator().manual_seed(0))

    def called(before: Tensor, rows: Tensor = every) -> Tensor:
        return _call(processor, before.clone(), drawn.to(device)[rows], rows)

    try:
        contexts, found = [prompts], [called(prompts)]
        for branch in range(2):
            before, scores = prompts, found[0]
            for _ in range(TRIED):
                token = _likely(scores, branch, ends)
                if token is None:
                    break
                before = torch.cat([before, token[:, None]], dim=1)
                scores = called(before)
                contexts.append(before)
                found.append(scores)
        again = [called(each) for each in reversed(contexts)][::-1]
        alone = [called(prompts[row : row + 1], every[row : row + 1]) for row in every.tolist()]
    except Exception as fault:  # a state may make it fail in any way
        return (
            "fails when it is called for several continuations: "
            f"{type(fault).__name__}: {first_line(fault)}"
        )
    if not _equal(found, again):
        return "depends on its earlier calls, and a draft tree calls it for several continuations"
    if not _equal([torch.cat(alone)], found[:1]):
        return "depends on the other rows of the batch"
    return None


def _likely(scores: Tensor, branch: int, ends: Sequence[int]) -> Tensor | None:
    """The best tokens [B], or the second best where allowed; None if a row has to end."""
    open_ended = scores.clone()
    open_ended[:, [end for end in ends if end < scores.shape[1]]] = -torch.inf
    best = open_ended.topk(min(2, scores.shape[1]))
    if not best.values[:, 0].isfinite().all():
        return None
    second = best.values[:, -1].isfinite() & (branch > 0)
    return torch.where(second, best.indices[:, -1], best.indices[:, 0])


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(a, b, equal_nan=True) for a, b in pairs)


def _call(processor: Any, before: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    """A processor's scores [G, V] for contexts [G, L] of the batch's ``rows`` [G].

    Some processors of transformers know the rows of the batch by their place in it, and so get each
    row alone.
    """
    of_row: Callable[[int], Any]
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn

        def of_row(row: int) -> Any:
            return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)

    elif type(processor) is EncoderRepetitionPenaltyLogitsProcessor:
        read: Any = processor.encoder_input_ids

        def of_row(row: int) -> Any:
            return EncoderRepetitionPenaltyLogitsProcessor(
                1 / processor.penalty, read[row : row + 1]
            )

    elif type(processor) is EncoderNoRepeatNGramLogitsProcessor:

        def of_row(row: int) -> Any:
            one = copy.copy(processor)
            one.batch_size, one.generated_ngrams = 1, processor.generated_ngrams[row : row + 1]
            return one

    elif type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(
        processor.prompt_ignore_length, Tensor
    ):
        ignored = processor.prompt_ignore_length.tolist()

        def of_row(row: int) -> Any:
            return RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row])

    else:
        whole: Tensor = processor(before, scores)
        return whole
    single = [
        of_row(row)(before[place : place + 1], scores[place : place + 1])
        for place, row in enumerate(rows.tolist())
    ]
    return torch.cat(single)
