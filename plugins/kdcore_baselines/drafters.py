"""Drafters that need no training: none at all, copies from the row itself, a smaller model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kdcore import UserError
from kdcore.decoding.sampling import draw
from kdcore.decoding.session import Session
from kdcore.decoding.tree import chain
from kdcore.method.records import LOG_ZERO, DraftTree

if TYPE_CHECKING:
    from kdcore import BuildContext, Params
    from kdcore_baselines.drafting_components import ModelParams, NgramParams


class Nothing:
    """Drafts nothing, so that each round emits one token: plain decoding."""

    layers = ()

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def bind(self, target: Any, tokenizer: Any) -> None: ...

    def start(self, first: Tensor) -> None: ...

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        none = tokens[:, :0]
        return DraftTree(none, chain(0, tokens.device), none.bool())


class Ngram:
    """Copies what followed the newest tokens where they last stood in the row."""

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
        for row, new, count in zip(self.rows, tokens.tolist(), lengths.tolist(), strict=True):
            row.extend(new[:count])
            drafts.append(row.copied(self.length) if count else [])
        # Zeros are no candidates: they fill rows that copy nothing.
        filled = [draft or [0] * self.length for draft in drafts]
        mask = torch.tensor([[bool(draft)] for draft in drafts], device=tokens.device)
        return DraftTree(
            torch.tensor(filled, device=tokens.device),
            chain(self.length, tokens.device),
            mask.expand(-1, self.length),
        )


class _Row:
    """The tokens of one row, and where the token after each n-gram last stood."""

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
        """`length` tokens from after the longest match; [] without one.

        A copy that reaches the row's end goes on through itself, so that a loop is continued.
        """
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            place = self.after.get(tuple(self.tokens[-n:]))
            if place is not None:
                tokens = self.tokens[place:]
                return (tokens * (length // len(tokens) + 1))[:length]
        return []


class SmallModel:
    """A small causal language model of the same vocabulary, run once for each drafted token.

    It keeps what was committed; its own drafts it forgets, and reads those accepted again in one
    pass with the bonus. Beyond its own context it drafts worse, which costs speed only.
    """

    layers = ()

    def __init__(self, params: ModelParams, context: BuildContext) -> None:
        loaded = context.load_model(params.model)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.name, self.length, self.temperature = params.model, params.length, params.temperature

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Raises UserError when the two tokenizers do not give the same ids to the same tokens."""
        own, other = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if own != other:
            raise UserError(
                f"{self.name} and the target differ in {len(own.items() ^ other.items())} entries "
                "of their vocabularies",
                "choose a small model of the target's family, with the same tokenizer",
            )
        self.model.to(target.device)
        self.session = Session(self.model)
        self.classes = target.config.get_text_config().vocab_size

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

    def _known(self, tokens: Tensor) -> Tensor:
        """The target's embedding may be padded with more ids than the small model's."""
        return tokens.clamp(max=self.model.config.get_text_config().vocab_size - 1)
