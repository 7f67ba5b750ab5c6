"""Draft trees: their records, their shapes, and the walk along the accepted path.

Slots are numbered as in `TreeShape`: 0 is the root, 1 + n is node n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.records import of_shape


@dataclass(frozen=True, slots=True)
class TreeShape:
    """Structure of a draft tree, separate from its tokens since a static tree reuses it.

    A slot is a place in the pass that scores the tree: slot 0 is the root (the last committed
    token, which the target has chosen but not yet run), slot 1 + n is node n. The leading
    dimension is B, or 1 when all rows share the shape. `shape_of` builds it.

    Attributes:
        parents: [B or 1, N] int64, the index of the parent node, or -1 for a child of the root;
            parents come before children.
        depth: [B or 1, 1 + N] int64, the number of edges from the root to each slot.
        sees: [B or 1, 1 + N, 1 + N] bool, whether slot i is slot j or descends from it.
        levels: A depth that no node exceeds, which the host knows without waiting for the device.
    """

    parents: Tensor
    depth: Tensor
    sees: Tensor
    levels: int


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Proposed continuations of B committed rows.

    Attributes:
        tokens: [B, N] int64; siblings have distinct tokens.
        shape: Structure of the tree.
        mask: [B, N] bool, False on the padding nodes of rows that propose fewer.
        logp: [B, N, V] float, the log-probs that each token was *sampled* from; None if the
            candidates are a fixed list (top-k), which every lossless verifier must treat as such.
    """

    tokens: Tensor
    shape: TreeShape
    mask: Tensor
    logp: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Accepted part of a draft tree.

    Attributes:
        path: [B, D] int64 node indices from the root down, -1 after the last accepted one.
        token: [B] int64, the target's own next token after the path (the bonus).
    """

    path: Tensor
    token: Tensor

    @property
    def accepted(self) -> Tensor:
        """[B] int64, the number of accepted nodes."""
        return (self.path >= 0).sum(1)


def shape_of(parents: Tensor, levels: int | None = None) -> TreeShape:
    """The shape of a tree.

    Args:
        parents: [B or 1, N] int64, the parent of each node, which precedes it; -1 for the root.
        levels: A depth that no node exceeds; without it, the host waits for the device at each
            level.

    Returns:
        The shape.
    """
    rows, nodes = parents.shape
    above = torch.cat([parents.new_zeros(rows, 1), parents + 1], dim=1)
    sees = torch.eye(1 + nodes, dtype=torch.bool, device=parents.device).repeat(rows, 1, 1)
    ancestor = torch.arange(1 + nodes, device=parents.device).expand(rows, -1)
    steps = 0
    while steps < levels if levels is not None else ancestor.any():
        ancestor = above.gather(1, ancestor)
        sees.scatter_(2, ancestor[:, :, None], True)
        steps += 1
    return TreeShape(parents, sees.sum(-1) - 1, sees, steps)


@lru_cache
def backbone(depth: int, k: int, device: torch.device) -> TreeShape:
    """A tree whose first candidate at each depth alone is expanded (FastEagle, section 3).

    Node (i - 1) k + r is candidate r at depth i; its parent is node (i - 2) k.

    Args:
        depth: Number of levels.
        k: Number of candidates at each depth.
        device: The device of the tensors.

    Returns:
        The shape.
    """
    level = torch.arange(depth * k, device=device) // k
    return shape_of(torch.where(level == 0, -1, (level - 1) * k)[None], depth)


def chain(depth: int, device: torch.device) -> TreeShape:
    """The shape with one candidate at each depth."""
    return backbone(depth, 1, device)


def well_formed(proposed: Any, rows: int, by: str) -> DraftTree:
    """What a drafter proposed; a tree of other sizes would fail in a pass of the target.

    Args:
        proposed: What it returned.
        rows: B.
        by: The drafter in the message.

    Returns:
        The tree.

    Raises:
        UserError: It is no draft tree, or its tensors are not those of B rows and N nodes.
    """
    if not isinstance(proposed, DraftTree):
        raise UserError(
            f"{by} proposed an object of type {type(proposed).__name__}, expected a DraftTree",
            f"correct {by}; `kdcore plugins check PACKAGE` tests an installed package",
        )
    nodes = proposed.shape.parents.shape[-1]
    of_shape(proposed.tokens, (rows, nodes), by, "tokens of a draft tree")
    of_shape(proposed.mask, (rows, nodes), by, "a mask of a draft tree")
    if (logp := proposed.logp) is not None:
        of_shape(logp, (rows, nodes, logp.shape[-1]), by, "log-probs of a draft tree")
    return proposed


def undrafted(rows: int, device: torch.device) -> DraftTree:
    """The tree without nodes, whose round is one of plain decoding.

    Args:
        rows: Number of rows B.
        device: The device of the tensors.

    Returns:
        The tree.
    """
    none = torch.empty(rows, 0, dtype=torch.int64, device=device)
    return DraftTree(none, chain(0, device), none.bool())


def is_chain(shape: TreeShape) -> bool:
    """Whether each node is the only child of its predecessor."""
    order = torch.arange(shape.parents.shape[1], device=shape.parents.device)
    return bool((shape.parents == order - 1).all())


def walk(tree: DraftTree, choose: Callable[[Tensor], Tensor]) -> Verdict:
    """Walk from the root down, as long as the target's choice is among the children.

    Args:
        tree: The draft tree.
        choose: A function from slots [B] to tokens [B], the target's next token after the slot of
            each row; called once for each slot on the path, and on an accelerator once for each
            level.

    Returns:
        The accepted path of each row, and the target's choice at its end.
    """
    slot = tree.tokens.new_zeros(tree.tokens.shape[0])
    token = choose(slot)
    moving = torch.ones_like(slot, dtype=torch.bool)
    path = []
    for _ in range(tree.shape.levels):
        below = tree.mask & (tree.shape.parents + 1 == slot[:, None])
        child = below & (tree.tokens == token[:, None]) & moving[:, None]
        moving = child.any(1)
        if moving.device.type == "cpu" and not moving.any():
            break  # elsewhere, the host would wait longer for the answer than the steps take
        node = child.int().argmax(1)
        path.append(torch.where(moving, node, -1))
        slot = torch.where(moving, node + 1, slot)
        token = torch.where(moving, choose(slot), token)
    empty = slot.new_zeros(len(slot), 0)
    return Verdict(torch.stack(path, dim=1) if path else empty, token)
