"""SuffixDecoding: draft what most often followed the newest tokens, from a tree of all suffixes.

A trie holds every piece of a row of at most `depth` tokens with its count. Below the node of the
last p tokens are their continuations. With C(N) the count of node N divided by that of all its
siblings and itself, and D(N) the product of C over the path, the draft is the tree of the
nodes of largest D, at most factor p of them; of all p the one with the largest sum of D is drafted.
Source: arXiv 2411.04975, section 3.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.models.device import sent
from kdcore_baselines.drafters.untrained import known_to_host

if TYPE_CHECKING:
    from kdcore import BuildContext
    from kdcore_baselines.drafting_components import SuffixParams


@dataclass(slots=True)
class Node:
    """A piece of text: how often it occurs, and what follows it."""

    count: int = 0
    children: dict[int, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of continuations.

    Attributes:
        tokens: The token of each node.
        parents: The index of each node's parent, or -1.
        depths: The depth of each node, from 1.
        score: The sum of D, the expected number of accepted tokens by the counts.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    score: float = 0.0


class Trie:
    """All pieces of at most ``depth`` tokens of some rows, with their counts."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.root = Node()

    def add(self, token: int, ending: list[Node], by: int = 1) -> list[Node]:
        """Append a token to a row.

        Args:
            token: The token.
            ending: The nodes of the row's last tokens: of the last one, the last two, and so on.
            by: 1, or -1 to take the token of a whole row out again.

        Returns:
            The nodes of the row's last tokens, with this one.
        """
        found = []
        for node in [self.root, *ending][: self.depth]:
            child = node.children.setdefault(token, Node())
            child.count += by
            if not child.count:
                del node.children[token]
            found.append(child)
        return found

    def follow(self, token: int, ending: list[Node | None]) -> list[Node | None]:
        """The nodes of the last tokens of a row that is not in the trie; None where it has none."""
        above = [self.root, *ending][: self.depth]
        return [None if node is None else node.children.get(token) for node in above]


class Suffix:
    """Drafter of the continuations that are frequent in the row, and in rows before it."""

    layers = ()

    def __init__(self, params: SuffixParams, context: BuildContext) -> None:
        self.params = params
        self.shared = Trie(params.depth)
        self.kept: deque[list[int]] = deque()
        self.rows: list[_Row] = []

    def bind(self, target: Any, tokenizer: Any) -> None: ...

    def start(self, first: Tensor) -> None:
        if self.params.remember:
            for row in self.rows:
                self._count(row.tokens, 1)
                self.kept.append(row.tokens)
            while len(self.kept) > self.params.remember:
                self._count(self.kept.popleft(), -1)
        self.rows = [_Row(self.params.depth, self.shared) for _ in first]
        for row, token in zip(self.rows, first.tolist(), strict=True):
            row.extend([token])

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        drafts = []
        for row, (count, *new) in zip(self.rows, known_to_host(tokens, lengths), strict=True):
            row.extend(new[:count])
            drafts.append(row.draft(self.params) if count else Draft())
        most = max(len(draft.tokens) for draft in drafts)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (most - len(values))

        nodes = [
            [padded(draft.tokens, 0), padded(draft.parents, -1), padded(draft.depths, 0)]
            for draft in drafts
        ]
        made = sent(torch.tensor(nodes, dtype=torch.int64), tokens.device)
        drafted, parents, depths = made.unbind(1)
        levels = max((depth for draft in drafts for depth in draft.depths), default=0)
        return DraftTree(drafted, shape_of(parents, levels), depths > 0)

    def _count(self, tokens: list[int], by: int) -> None:
        ending: list[Node] = []
        for token in tokens:
            ending = self.shared.add(token, ending, by)


class _Row:
    """The tokens of a row, its trie, and the nodes of its last tokens in both tries."""

    def __init__(self, depth: int, shared: Trie) -> None:
        self.tokens: list[int] = []
        self.trie, self.shared = Trie(depth), shared
        self.ending: list[Node] = []
        self.shared_ending: list[Node | None] = []

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.ending = self.trie.add(token, self.ending)
            self.shared_ending = self.shared.follow(token, self.shared_ending)

    def draft(self, params: SuffixParams) -> Draft:
        """The draft of the largest score; of equal ones that after the longest match."""
        best = Draft()
        for length in range(len(self.tokens[-params.depth :]), 0, -1):
            most = min(params.nodes, int(params.factor * length))
            for ending in (self.ending, self.shared_ending):
                node = ending[length - 1]
                found = Draft() if node is None else grown(node, most, params.least)
                best = max(best, found, key=lambda draft: draft.score)
        return best


def grown(match: Node, most: int, least: float) -> Draft:
    """Grow the tree of the most likely continuations.

    Args:
        match: The node of the last tokens.
        most: Maximum number of nodes.
        least: Minimum of D.

    Returns:
        The tree; empty if nothing followed.
    """
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    score, order = 0.0, 0
    heap: list[tuple[float, int, int, int, int, Node]] = []

    def offer(node: Node, chance: float, parent: int, depth: int) -> None:
        nonlocal order
        whole = sum(child.count for child in node.children.values())
        for token, child in node.children.items():
            order += 1  # of equal ones the first that was seen
            heapq.heappush(
                heap, (-chance * child.count / whole, order, token, parent, depth, child)
            )

    offer(match, 1.0, -1, 1)
    while heap and len(tokens) < most:
        chance, _, token, parent, depth, node = heapq.heappop(heap)
        if -chance < least:
            break
        tokens.append(token)
        parents.append(parent)
        depths.append(depth)
        score -= chance
        offer(node, -chance, len(tokens) - 1, depth + 1)
    return Draft(tokens, parents, depths, score)
