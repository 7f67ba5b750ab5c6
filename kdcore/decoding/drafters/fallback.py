"""Two drafters in one: the second is asked where the first drafts nothing.

The first reads tokens alone and costs next to nothing, e.g. SuffixDecoding, which drafts what the
text says again; the second is trained. Source: SuffixDecoding, arXiv 2411.04975, section 4, whose
hybrid falls back to a drafting model where the match of the suffix is worth little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from kdcore.decoding.drafters.backlog import Backlog
from kdcore.decoding.protocols import Drafter
from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.errors import UserError


class FallbackDrafter:
    """A `kdcore.decoding.protocols.Drafter` of two that are bound to one target.

    Rows fall back one by one. In a round whose rows all have drafts of the first, the second is not
    asked; it reads the tokens of such rounds in its next proposal.

    Args:
        first: The drafter that is asked first; it reads no hidden states.
        fallback: The other one.

    Attributes:
        layers: Those of the fallback.

    Raises:
        UserError: ``first`` reads hidden states.
    """

    def __init__(self, first: Drafter, fallback: Drafter) -> None:
        if first.layers:
            raise UserError(
                f"the drafter {type(first).__name__} reads hidden states of the target, and the "
                "drafter that is asked first reads tokens alone",
                "choose suffix or ngram as the first drafter",
                "first",
            )
        self.first, self.fallback = first, fallback
        self.layers = fallback.layers
        self._backlog = Backlog()

    @property
    def tree(self) -> Any:
        """The tree of the fallback's proposals."""
        return getattr(self.fallback, "tree", None)

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Bind both; see `kdcore.decoding.protocols.Drafter.bind`."""
        self.first.bind(target, tokenizer)
        self.fallback.bind(target, tokenizer)
        self.layers = self.fallback.layers

    def start(self, first: Tensor) -> None:
        """Start both; see `kdcore.decoding.protocols.Drafter.start`."""
        self.first.start(first)
        self.fallback.start(first)
        self._backlog = Backlog()

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Generator | None
    ) -> DraftTree:
        """Propose a tree for each row; see `kdcore.decoding.protocols.Drafter.propose`."""
        self._backlog.add(tokens, features, lengths)
        active = lengths > 0
        ours = self.first.propose(tokens, features[..., :0], lengths, generator)
        if _all_drafted(ours, active):
            return ours
        theirs = self.fallback.propose(*self._backlog.take(active), generator)
        return _joined(ours, theirs) if ours.tokens.shape[1] else theirs


def _all_drafted(tree: DraftTree, active: Tensor) -> bool:
    """Whether each active row has nodes; on an accelerator only where the host knows it."""
    if not tree.tokens.shape[1]:
        return False
    if len(active) == 1:
        return True  # a tree is as wide as its widest row
    return active.device.type == "cpu" and bool((tree.mask.any(1) | ~active).all())


def _joined(ours: DraftTree, theirs: DraftTree) -> DraftTree:
    """The nodes of both, side by side: of each row ours, or theirs where ours has none."""
    drafted = ours.mask.any(1, keepdim=True)
    rows, width = ours.tokens.shape
    parents = torch.where(theirs.shape.parents < 0, -1, theirs.shape.parents + width)
    both = [each.expand(rows, -1) for each in (ours.shape.parents, parents)]
    shape = shape_of(torch.cat(both, dim=1), max(ours.shape.levels, theirs.shape.levels))
    return DraftTree(
        torch.cat([ours.tokens, theirs.tokens], dim=1),
        shape,
        torch.cat([ours.mask, theirs.mask & ~drafted], dim=1),
    )
