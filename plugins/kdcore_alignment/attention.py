"""Match the attention maps of chosen layers.

With a and b the weights of student and teacher for the S visible keys of a query, in one of A
heads, and x and y their scores before the softmax, the distance of a pair of layers at one query is

    kl             (1/A) sum_heads sum_keys b log(b / a)
    mse            (1/A) sum_heads (1/S) sum_keys (a - b)^2
    mse_of_scores  (1/A) sum_heads (1/S) sum_keys (x - y)^2

The scores are q k / sqrt(d) of queries and keys or, with ``maps: values``, v v' / sqrt(d).

Sources: MiniLM, arXiv 2002.10957, its attention transfer L_AT and its value relations L_VR (kl, of
the last layers); TinyBERT, arXiv 1909.10351, equation 7 (mse_of_scores, and the uniform mapping of
layers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcore import BuildContext, StateSizes, UserError, by_keywords
from kdcore.method.records import LOG_ZERO
from kdcore_alignment import params
from kdcore_alignment.pairs import pairs_of


class Attention(nn.Module):
    """Matcher of attention maps."""

    attention = True

    @by_keywords(params.Attention)
    def __init__(self, params: params.Attention, context: BuildContext) -> None:
        super().__init__()
        self.params = params
        self.values = params.maps == "values"
        self.pairs: tuple[tuple[int, int], ...] = ()

    def bind(self, student: StateSizes, teacher: StateSizes) -> None:
        count, how = (student.layers, teacher.layers), self.params.heads
        self.pairs = pairs_of(self.params.pairs, *count, "attention", first=1, what="layer")
        ours, theirs = (
            each.key_heads if self.values else each.heads for each in (student, teacher)
        )
        few, many = sorted((ours, theirs))
        fits = {"each": few == many, "groups": few > 0 and many % few == 0, "mean": True}
        if not fits[how]:
            raise UserError(
                f"matcher 'attention' has heads: {how}, but the layers of the student have "
                f"{ours} {'value ' * self.values}heads and those of the teacher {theirs}",
                "set heads: groups or heads: mean"
                if few and many % few == 0
                else "set heads: mean",
            )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        distances = [self._distance(*pair) for pair in zip(student, teacher, strict=True)]
        return torch.stack(distances).sum(0)

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """[C] the distance of the maps [C, heads, S] of one pair."""
        heads = 1 if self.params.heads == "mean" else min(ours.shape[1], theirs.shape[1])
        if self.params.distance == "mse_of_scores":
            x, y = (_grouped(each, heads).mean(2) for each in (ours, theirs))
        else:
            x, y = (_mean_of_heads(each, heads) for each in (ours, theirs))
        if self.params.distance == "kl":
            return (y.exp() * (y - x)).sum(-1).mean(1)
        if self.params.distance == "mse":
            x, y = x.exp(), y.exp()
        visible = theirs[:, 0] > LOG_ZERO
        squares = ((x - y) ** 2).mean(1) * visible
        return squares.sum(-1) / visible.sum(-1)


def _grouped(maps: Tensor, heads: int) -> Tensor:
    """[C, heads, k, S] from maps [C, k * heads, S]."""
    return maps.view(len(maps), heads, -1, maps.shape[-1])


def _mean_of_heads(scores: Tensor, heads: int) -> Tensor:
    """[C, heads, S] the log of the mean weights of each k successive heads."""
    logp = _grouped(scores.log_softmax(-1), heads)
    return logp.logsumexp(2) - math.log(logp.shape[2])
