"""Draft trees: from one distribution per depth, or grown pass by pass from a drafter's drafts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from kdcore import DraftTree
from kdcore.decoding import tree
from kdcore.decoding.trials.drafting_account import DraftingAccount
from kdcore.models.device import sent
from kdcore_baselines.drafting_components import BestFirstParams, DynamicParams

if TYPE_CHECKING:
    from kdcore import BuildContext, Params
    from kdcore_baselines.drafting_components import AutotuneParams, BackboneParams

_Node: TypeAlias = tuple[int, int, int, float]
"""Parent, level, rank in the level, and path cost (minus the sum of the log-probs) of a node."""

Following: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function from places and tokens to the next distributions: see
`kdcore.decoding.protocols.TreeGrower`."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The nodes of a beam search.

    Attributes:
        tokens: [B, M] int64.
        parents: [B, M] int64, the index of each node's parent, or -1.
        logp: [B, M] sums of the log-probs on the paths, in decreasing order.
        order: [B, M] int64, the nodes in that order.
    """

    tokens: Tensor
    parents: Tensor
    logp: Tensor
    order: Tensor


class Backbone:
    """Tree with k candidates at each depth, of which only the most likely one is expanded."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.branches = k > 1

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        return self._of(self._best(logp), active)

    def grow(self, logp: Tensor, following: Following, depth: int, active: Tensor) -> DraftTree:
        levels = [self._best(logp)]
        first = levels[0].new_zeros(len(logp), 1)
        while len(levels) < depth:
            levels.append(self._best(following(first, levels[-1][:, :1])[:, 0]))
        return self._of(torch.stack(levels, dim=1), active)

    def _best(self, logp: Tensor) -> Tensor:
        return logp.topk(min(self.k, logp.shape[-1])).indices

    def _of(self, tokens: Tensor, active: Tensor) -> DraftTree:
        """Build the tree of tokens [B, D, k]."""
        shape = tree.backbone(*tokens.shape[1:], tokens.device)
        flat = tokens.flatten(1)
        return DraftTree(flat, shape, active[:, None].expand_as(flat))


class Dynamic:
    """Tree that expands the most likely nodes at each depth and keeps the most likely of all.

    The probability of a node is the product of the probabilities on its path.
    """

    def __init__(self, params: DynamicParams, context: BuildContext) -> None:
        self.beams, self.nodes = params.beams, params.nodes
        self.branches = min(self.beams, self.nodes) > 1

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        levels = iter(logp.unbind(1))
        first = next(levels)
        return self.grow(
            first,
            lambda places, tokens: next(levels)[:, None].expand(-1, tokens.shape[1], -1),
            logp.shape[1],
            active,
        )

    def grow(self, logp: Tensor, following: Following, depth: int, active: Tensor) -> DraftTree:
        return self.kept(self.search(logp, following, depth), self.nodes, depth, active)

    def search(self, logp: Tensor, following: Following, depth: int) -> Candidates:
        """Find candidates by beam search; see `kdcore.decoding.protocols.TreeGrower`.

        Args:
            logp: [B, V] log-probs at depth 1.
            following: Function to the next distributions.
            depth: Number of levels.

        Returns:
            All nodes that were found.
        """
        beams = min(self.beams, logp.shape[-1])
        score, token = logp.topk(beams)
        node = torch.arange(beams, device=logp.device).expand_as(token)
        place, tokens, scores = torch.zeros_like(token), [token], [score]
        parents = [torch.full_like(token, -1)]
        count = beams
        for _ in range(1, depth):
            best = following(place, token).topk(beams)  # [B, beams, beams]
            scores.append((score[:, :, None] + best.values).flatten(1))
            tokens.append(best.indices.flatten(1))
            parents.append(node.repeat_interleave(beams, dim=1))
            score, chosen = scores[-1].topk(beams)
            place, token, node = chosen // beams, tokens[-1].gather(1, chosen), count + chosen
            count += beams**2
        # A path is at most as likely as its prefix, which the stable sort puts before it.
        ranked = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
        return Candidates(torch.cat(tokens, dim=1), torch.cat(parents, dim=1), *ranked)

    @staticmethod
    def kept(found: Candidates, nodes: int, depth: int, active: Tensor) -> DraftTree:
        """Build the tree of the most likely candidates.

        Args:
            found: The candidates.
            nodes: Number of nodes to keep.
            depth: Number of levels.
            active: [B] bool, the rows that propose.

        Returns:
            The tree.
        """
        kept = found.order[:, :nodes].sort(dim=1).values
        number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        renumbered = torch.full_like(found.order, -1).scatter(1, kept, number)
        above = found.parents.gather(1, kept)
        above = torch.where(above < 0, above, renumbered.gather(1, above.clamp(min=0)))
        return DraftTree(
            found.tokens.gather(1, kept),
            tree.shape_of(above, depth),
            active[:, None].expand_as(kept),
        )


class BestFirst:
    """Tree of the nodes with the most likely paths, by the sum of the log-probs of their levels.

    If the drafter were right and the levels independent, the probability of a path would be that
    of its acceptance. The sum over the nodes is then the expected number of accepted tokens, and no
    other tree of the same size has a larger one. Rows with fewer nodes are padded.
    """

    def __init__(self, params: BestFirstParams, context: BuildContext) -> None:
        self.nodes = params.nodes
        self.branches = self.nodes > 1

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        rows, depth = logp.shape[:2]
        best = logp.topk(min(self.nodes, logp.shape[-1]), dim=-1)
        # one copy to the host, which waits for it: the log-probs, and whether the row is active
        known = torch.cat([best.values.flatten(1), active[:, None].to(logp.dtype)], dim=1)
        found = [
            _likeliest(_in_levels(row, depth), self.nodes) if proposes else []
            for *row, proposes in known.tolist()
        ]
        size = self.size([[math.exp(-node[3]) for node in nodes] for nodes in found])
        if not size:
            return tree.undrafted(rows, logp.device)
        padding: list[_Node] = [(-1, 0, 0, 0.0)]
        padded = [nodes[:size] + padding * (size - len(nodes)) for nodes in found]
        places = [
            [(*node[:3], place < len(own)) for place, node in enumerate(nodes)]
            for nodes, own in zip(padded, found, strict=True)
        ]
        parents, level, rank, real = sent(torch.tensor(places), logp.device).unbind(-1)
        row = torch.arange(rows, device=logp.device)[:, None]
        deepest = max((node[1] + 1 for nodes in padded for node in nodes), default=0)
        shape = tree.shape_of(parents, deepest)
        return DraftTree(best.indices[row, level, rank], shape, real.bool())

    def size(self, chances: list[list[float]]) -> int:
        """Choose the number of nodes to keep.

        Args:
            chances: Probabilities of the nodes of each row, in decreasing order.

        Returns:
            The number of nodes of the tree.
        """
        return self.nodes


class Autotune(BestFirst):
    """`BestFirst` with the size that maximises the expected tokens per second of each round.

        n = argmax (B + sum of the probabilities of the first n nodes of each row) / cost(B (1 + n))

    The probability of a path is its contribution to the expected tokens; ``cost`` is the measured
    time of a round in seconds. Rounds are small where the drafter is uncertain and large where it
    is confident. Where no tree pays, n is 0, and by its ``account`` the loop stops to ask the
    drafter: probabilities are the drafter's own, but an account has what was accepted.

    A drafter that reads its own drafts gives the candidates of `Dynamic` instead.
    """

    def __init__(self, params: AutotuneParams, context: BuildContext) -> None:
        super().__init__(BestFirstParams(nodes=params.most), context)
        self.beam = Dynamic(DynamicParams(beams=params.beams, nodes=params.most), context)
        self.cost: Callable[[int], float] | None = None
        self.account: DraftingAccount | None = DraftingAccount()

    def grow(self, logp: Tensor, following: Following, depth: int, active: Tensor) -> DraftTree:
        found = self.beam.search(logp, following, depth)
        best = found.logp[:, : self.nodes]
        # one copy to the host, as above
        known = torch.cat([best.exp(), active[:, None].to(best.dtype)], dim=1).tolist()
        size = self.size([chances if proposes else [] for *chances, proposes in known])
        if not size:
            return tree.undrafted(len(logp), logp.device)
        return self.beam.kept(found, size, depth, active)

    def tune(self, measure: Callable[[], Callable[[int], float]]) -> None:
        """Measure the cost of a round, once.

        Args:
            measure: Function that returns the cost: seconds by the rows of the target's pass.
        """
        if self.cost is None:
            self.cost = measure()

    def size(self, chances: list[list[float]]) -> int:
        if self.cost is None:
            return self.nodes
        rows, best, chosen = len(chances), 0.0, 1
        expected = float(sum(bool(row) for row in chances))  # each row always gets its bonus
        if self.account is not None:
            best, chosen = expected / self.cost(rows), 0
        for count in range(1, self.nodes + 1):
            expected += sum(row[count - 1] for row in chances if len(row) >= count)
            rate = expected / self.cost(rows * (1 + count))
            if rate > best:
                best, chosen = rate, count
        return chosen


def _in_levels(values: list[float], depth: int) -> list[list[float]]:
    """The values [D, K] of a row, from its flat list."""
    width = len(values) // depth
    return [values[start : start + width] for start in range(0, len(values), width)]


def _likeliest(levels: list[list[float]], nodes: int) -> list[_Node]:
    """Find the given number of nodes, the most likely first.

    ``levels`` [D, K] has the log-probs of each level, sorted in decreasing order. A path is a rank
    at each level. The search reaches it once, from a path that is at least as likely: the one whose
    last rank is one lower or, if that rank is 0, the one that ends a level above.
    """
    found: list[_Node] = []
    heap: list[tuple[float, tuple[int, ...], float, int]] = [(-levels[0][0], (0,), 0.0, -1)]
    while heap and len(found) < nodes:
        cost, ranks, above, parent = heappop(heap)
        level, rank = len(ranks) - 1, ranks[-1]
        if rank + 1 < len(levels[level]):
            beside = above - levels[level][rank + 1]
            heappush(heap, (beside, (*ranks[:-1], rank + 1), above, parent))
        if level + 1 < len(levels):
            heappush(heap, (cost - levels[level + 1][0], (*ranks, 0), cost, len(found)))
        found.append((parent, level, rank, cost))
    return found


def chain(params: Params, context: BuildContext) -> Backbone:
    """Build the tree ``chain``: the most likely token at each depth."""
    return Backbone(k=1)


def backbone(params: BackboneParams, context: BuildContext) -> Backbone:
    """Build the tree ``backbone`` of FastEagle."""
    return Backbone(params.k)
