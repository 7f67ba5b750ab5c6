"""Drafters without training: no drafts, copies from the row, a small model, or own layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kdcore import UserError
from kdcore.decoding.sampling import draw
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, chain, undrafted
from kdcore.method.records import LOG_ZERO
from kdcore.models.device import sent
from kdcore.models.loading.cut import sharing_layers

if TYPE_CHECKING:
    from kdcore import BuildContext, Params
    from kdcore_baselines.drafting_components import (
        ModelParams,
        NgramParams,
        SelfSpeculativeParams,
    )


class Nothing:
    """Drafter without drafts, so that each round emits one token: plain decoding."""

    layers = ()

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def bind(self, target: Any, tokenizer: Any) -> None: ...

    def start(self, first: Tensor) -> None: ...

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        return undrafted(len(tokens), tokens.device)


class Ngram:
    """Drafter that copies the tokens after the last earlier occurrence of the newest tokens."""

    layers = ()

    def __init__(self, params: NgramParams, context: BuildContext) -> None:
        self.longest, self.length = params.longest, params.length

    def bind(self, target: Any, tokenizer: Any) -> None: ...

    def start(self, first: Tensor) -> None:
        self.rows = [_Row(token, self.longest) for token in first.tolist()]

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        drafts = []
        for row, (count, *new) in zip(self.rows, known_to_host(tokens, lengths), strict=True):
            row.extend(new[:count])
            drafts.append(row.copied(self.length) if count else [])
        if not any(drafts):
            return undrafted(len(tokens), tokens.device)
        # Zeros pad the rows without a match; the mask excludes them.
        filled = [[bool(draft), *(draft or [0] * self.length)] for draft in drafts]
        found = sent(torch.tensor(filled), tokens.device)
        mask = found[:, :1].bool().expand(-1, self.length)
        return DraftTree(found[:, 1:], chain(self.length, tokens.device), mask)


def known_to_host(tokens: Tensor, lengths: Tensor) -> list[list[int]]:
    """Each row's number of new tokens and the tokens, in one copy: the host waits for each one."""
    known: list[list[int]] = torch.cat([lengths[:, None], tokens], dim=1).tolist()
    return known


class _Row:
    """Tokens of one row, and the last place after each n-gram."""

    def __init__(self, first: int, longest: int) -> None:
        self.tokens = [first]
        self.longest = longest
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            for n in range(1, min(self.longest, len(self.tokens)) + 1):
                self.after[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def copied(self, length: int) -> list[int]:
        """Return `length` tokens from after the longest match, or [] without a match.

        A copy that reaches the end of the row continues with its own tokens, which repeats loops.
        """
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            place = self.after.get(tuple(self.tokens[-n:]))
            if place is not None:
                tokens = self.tokens[place:]
                return (tokens * (length // len(tokens) + 1))[:length]
        return []


class SmallModel:
    """Drafter that runs a small causal language model once for each drafted token.

    The model has the target's vocabulary. Its cache keeps committed tokens only: it drops the
    drafts and rereads the accepted ones in one pass with the bonus token. Beyond the model's
    context length the drafts get worse, which costs speed only.
    """

    layers = ()

    def __init__(self, params: ModelParams, context: BuildContext) -> None:
        loaded = context.load_model(params.model)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.name, self.length, self.temperature = params.model, params.length, params.temperature

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Bind the drafter to its target.

        Args:
            target: Target model.
            tokenizer: Tokenizer of the target.

        Raises:
            UserError: The two tokenizers map tokens to different ids.
        """
        own, other = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if own != other:
            raise UserError(
                f"the vocabularies of {self.name} and the target differ in "
                f"{len(own.items() ^ other.items())} entries",
                "choose a small model with the target's tokenizer",
            )
        self._draft_with(self.model.to(target.device), target)

    def start(self, first: Tensor) -> None:
        self.session.start(len(first))
        self.session.extend(self._known(first[:, None]), torch.ones_like(first))

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        active = lengths > 0
        logits, _ = self.session.extend(self._known(tokens), lengths)
        committed = self.session.lengths
        drafted: list[Tensor] = []
        drafted_logp: list[Tensor] = []
        for depth in range(self.length):
            if depth:
                logits, _ = self.session.extend(drafted[-1][:, None], active.long())
            known = logits[:, : self.classes].float()
            if self.temperature == 0:
                drafted.append(known.argmax(-1))
                continue
            logp = (known / self.temperature).log_softmax(-1).clamp(min=LOG_ZERO)
            drafted.append(draw(logp.exp(), generator))
            absent = self.classes - logp.shape[-1]
            drafted_logp.append(functional.pad(logp, (0, absent), value=LOG_ZERO))
        self.session.rewind(committed)
        return DraftTree(
            torch.stack(drafted, dim=1),
            chain(self.length, tokens.device),
            active[:, None].expand(-1, self.length),
            torch.stack(drafted_logp, dim=1) if drafted_logp else None,
        )

    def _draft_with(self, model: Any, target: Any) -> None:
        self.model, self.session = model, Session(model)
        self.classes = target.config.get_text_config().vocab_size

    def _known(self, tokens: Tensor) -> Tensor:
        """Clamp tokens to the small model's ids, since the target's embedding may have more."""
        return tokens.clamp(max=self.model.config.get_text_config().vocab_size - 1)


class SelfSpeculative(SmallModel):
    """Drafter that runs some of the target's layers, with its final norm and its head.

    It shares the target's weights, and has a cache of its own.
    """

    def __init__(self, params: SelfSpeculativeParams, context: BuildContext) -> None:
        self.kept, self.length, self.temperature = params.layers, params.length, params.temperature

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Bind the drafter to its target.

        Args:
            target: Target model.
            tokenizer: Not used.

        Raises:
            UserError: The target does not have these layers, or its weights cannot be shared.
        """
        kept = range(self.kept) if isinstance(self.kept, int) else self.kept
        self._draft_with(sharing_layers(target, kept), target)
