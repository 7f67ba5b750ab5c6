"""The shapes of draft trees, and the walk down one.

Slots, as in `TreeShape`: 0 is the root, 1 + n is node n.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kdcore.method.records import DraftTree, TreeShape, Verdict


def shape_of(parents: Tensor) -> TreeShape:
    """The shape given by ``parents`` [B or 1, N], parents before children, -1 below the root."""
    rows, nodes = parents.shape
    above = torch.cat([parents.new_zeros(rows, 1), parents + 1], dim=1)
    sees = torch.eye(1 + nodes, dtype=torch.bool, device=parents.device).repeat(rows, 1, 1)
    ancestor = torch.arange(1 + nodes, device=parents.device).expand(rows, -1)
    while ancestor.any():
        ancestor = above.gather(1, ancestor)
        sees.scatter_(2, ancestor[:, :, None], True)
    return TreeShape(parents, sees.sum(-1) - 1, sees)


@lru_cache
def backbone(depth: int, k: int, device: torch.device) -> TreeShape:
    """Have k candidates at each depth, of which the first alone is expanded (FastEagle, section 3).

    Node (i - 1) k + r is candidate r at depth i; its parent is node (i - 2) k.
    """
    level = torch.arange(depth * k, device=device) // k
    return shape_of(torch.where(level == 0, -1, (level - 1) * k)[None])


def chain(depth: int, device: torch.device) -> TreeShape:
    """One candidate at each depth."""
    return backbone(depth, 1, device)


def is_chain(shape: TreeShape) -> bool:
    """Whether each node is the only child of the one before it."""
    order = torch.arange(shape.parents.shape[1], device=shape.parents.device)
    return bool((shape.parents == order - 1).all())


def walk(tree: DraftTree, choose: Callable[[Tensor], Tensor]) -> Verdict:
    """From the root down, wherever the target's own choice is among the candidates.

    choose: slots [B] -> tokens [B], the target's next token after each row's slot; asked once
        for each slot on the way. A row whose choice is no child of its slot stops there.
    """
    slot = tree.tokens.new_zeros(tree.tokens.shape[0])
    token = choose(slot)
    moving = torch.ones_like(slot, dtype=torch.bool)
    path = []
    while True:
        below = tree.mask & (tree.shape.parents + 1 == slot[:, None])
        child = below & (tree.tokens == token[:, None]) & moving[:, None]
        moving = child.any(1)
        if not moving.any():
            break
        node = child.int().argmax(1)
        path.append(torch.where(moving, node, -1))
        slot = torch.where(moving, node + 1, slot)
        token = torch.where(moving, choose(slot), token)
    empty = slot.new_zeros(len(slot), 0)
    return Verdict(torch.stack(path, dim=1) if path else empty, token)
