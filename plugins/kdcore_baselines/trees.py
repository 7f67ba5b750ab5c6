"""Trees over one distribution per depth, and trees that grow as a drafter reads its own drafts."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from kdcore import DraftTree
from kdcore.decoding import tree
from kdcore_baselines.drafting_components import BestFirstParams

if TYPE_CHECKING:
    from kdcore import BuildContext, Params
    from kdcore_baselines.drafting_components import AutotuneParams, BackboneParams, DynamicParams

_Node: TypeAlias = tuple[int, int, int, float]
"""Its parent, level, rank there, and the cost of its path: minus the sum of the log-probs."""

Following: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""See `kdcore.method.protocols.TreeGrower`."""


class Backbone:
    """k candidates at each depth, of which the likeliest alone is expanded."""

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
        """tokens: [B, D, k]."""
        shape = tree.backbone(*tokens.shape[1:], tokens.device)
        flat = tokens.flatten(1)
        return DraftTree(flat, shape, active[:, None].expand_as(flat))


class Dynamic:
    """The likeliest nodes are expanded at each depth, and the likeliest of all are kept.

    How likely a node is, is the product of the probabilities on its path.
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
        # A path is at most as likely as its beginning, which the stable order puts before it.
        order = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True).indices
        kept = order[:, : self.nodes].sort(dim=1).values
        number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        renumbered = torch.full_like(order, -1).scatter(1, kept, number)
        above = torch.cat(parents, dim=1).gather(1, kept)
        above = torch.where(above < 0, above, renumbered.gather(1, above.clamp(min=0)))
        return DraftTree(
            torch.cat(tokens, dim=1).gather(1, kept),
            tree.shape_of(above),
            active[:, None].expand_as(kept),
        )


class BestFirst:
    """The nodes whose paths are the likeliest, each level's log-probs summed.

    The chance of a path is that it is accepted, were the drafter right and the levels independent.
    So their sum over the nodes is the number of tokens that are expected to be accepted, and no
    tree of as many nodes has a greater one. A row of fewer nodes is padded.
    """

    def __init__(self, params: BestFirstParams, context: BuildContext) -> None:
        self.nodes = params.nodes
        self.branches = self.nodes > 1

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        best = logp.topk(min(self.nodes, logp.shape[-1]), dim=-1)
        found = [
            _likeliest(levels, self.nodes) if proposes else []
            for levels, proposes in zip(best.values.tolist(), active.tolist(), strict=True)
        ]
        size = self.size(found)
        padding: list[_Node] = [(-1, 0, 0, 0.0)]
        padded = [nodes[:size] + padding * (size - len(nodes)) for nodes in found]
        places = [[node[:3] for node in nodes] for nodes in padded]
        parents, level, rank = torch.tensor(places, device=logp.device).unbind(-1)
        count = torch.tensor([len(nodes) for nodes in found], device=logp.device)
        mask = torch.arange(size, device=logp.device) < count[:, None]
        rows = torch.arange(len(logp), device=logp.device)[:, None]
        return DraftTree(best.indices[rows, level, rank], tree.shape_of(parents), mask)

    def size(self, found: list[list[_Node]]) -> int:
        """How many of the nodes that were found for each row are kept."""
        return self.nodes


class Autotune(BestFirst):
    """`BestFirst` of as many nodes as promise the most tokens a second, chosen at every round.

        n = argmax (B + sum of the chances of the first n nodes of each row) / cost(B (1 + n))

    The chance of a path is what it adds to the tokens that are expected, and cost the measured
    seconds of a round. Where the drafter is unsure a round is short, where it is sure a large one.
    """

    def __init__(self, params: AutotuneParams, context: BuildContext) -> None:
        super().__init__(BestFirstParams(nodes=params.most), context)
        self.cost: Callable[[int], float] | None = None

    def tune(self, measure: Callable[[], Callable[[int], float]]) -> None:
        """Take the cost of a round, seconds by rows of the target's pass; measured once."""
        if self.cost is None:
            self.cost = measure()

    def size(self, found: list[list[_Node]]) -> int:
        if self.cost is None:
            return self.nodes
        rows, best, chosen = len(found), 0.0, 1
        expected = float(sum(bool(nodes) for nodes in found))  # each is certain of its bonus
        for count in range(1, self.nodes + 1):
            expected += sum(
                math.exp(-nodes[count - 1][3]) for nodes in found if len(nodes) >= count
            )
            rate = expected / self.cost(rows * (1 + count))
            if rate > best:
                best, chosen = rate, count
        return chosen


def _likeliest(levels: list[list[float]], nodes: int) -> list[_Node]:
    """So many nodes, the likeliest first.

    levels: [D, K] log-probs, each level's falling. A path is a rank at each level. It is reached
    once, from a path no less likely: the one whose last rank is one lower or, where that rank is
    0, the one that ends a level above.
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
    """The likeliest token at each depth."""
    return Backbone(k=1)


def backbone(params: BackboneParams, context: BuildContext) -> Backbone:
    """FastEagle's tree."""
    return Backbone(params.k)
