"""Drafters that know all, nothing, or the wrong things, to hold the loop to account."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdcore.decoding.tree import DraftTree
from kdcore_baselines.trees import Backbone

CHAIN = Backbone(k=1)


class Levels:
    """Asks for one distribution per depth [D, V] after a row's tokens, and builds a tree."""

    layers = ()

    def __init__(self, levels_of: Callable[[list[int]], Tensor], tree: Backbone = CHAIN) -> None:
        self.levels_of, self.tree = levels_of, tree

    def bind(self, target, tokenizer) -> None: ...

    def start(self, first: Tensor) -> None:
        self.rows = [[token] for token in first.tolist()]
        self.lengths: list[list[int]] = []

    def propose(self, tokens: Tensor, features: Tensor, lengths: Tensor, generator) -> DraftTree:
        self.lengths.append(lengths.tolist())
        for row, new, count in zip(self.rows, tokens.tolist(), lengths.tolist(), strict=True):
            row += new[:count]
        logp = torch.stack([self.levels_of(row) for row in self.rows])
        return self.tree(logp, lengths > 0)


class Pauses:
    """An account that asks by a pattern, over and over; ``learned`` is what it was told."""

    def __init__(self, *asked: bool) -> None:
        self.asked = asked
        self.learned: list[bool] = []

    def start(self, rows: int) -> None: ...

    def asks(self) -> bool:
        return self.asked[len(self.learned) % len(self.asked)]

    def learn(self, asked: bool, emitted: list[int], seconds: float) -> None:
        assert asked == self.asks() and min(emitted) > 0 and seconds >= 0
        self.learned.append(asked)


def oracle(
    sequences: list[list[int]], depth: int, classes: int, rank: int = 0
) -> Callable[[list[int]], Tensor]:
    """Levels that put what really follows at `rank`, wrong tokens before it."""

    def levels_of(row: list[int]) -> Tensor:
        [sequence] = [full for full in sequences if full[: len(row)] == row]
        following = (sequence[len(row) :] + [0] * depth)[:depth]
        logits = torch.zeros(depth, classes)
        for level, token in zip(logits, following, strict=True):
            level[[(token + 1 + wrong) % classes for wrong in range(rank)]] = 9.0
            level[token] = 8.0
        return logits.log_softmax(-1)

    return levels_of


def clueless(depth: int, classes: int, seed: int = 0) -> Callable[[list[int]], Tensor]:
    """Random levels."""
    generator = torch.Generator().manual_seed(seed)
    return lambda row: torch.randn(depth, classes, generator=generator).log_softmax(-1)
