"""What makes a draft tree valid, held for trees and for the drafters that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.tree import shape_of
from kdcore.method.records import DraftTree
from kdcore.testing.suite import same


def assert_form(tree: DraftTree, rows: int, classes: int) -> None:
    """Assert dtypes and sizes, and that every node in the mask is one.

    rows: B. classes: V. What the tree's shape must be is for `assert_shape`.
    """
    nodes = tree.tokens.shape[1]
    assert len(tree.tokens) == rows, f"the tree has {len(tree.tokens)} rows, not {rows}"
    assert tree.tokens.dtype == torch.int64, f"tokens are {tree.tokens.dtype}, not int64"
    assert tree.mask.shape == (rows, nodes), f"the mask is {tuple(tree.mask.shape)}, not [B, N]"
    assert tree.mask.dtype == torch.bool, f"the mask is {tree.mask.dtype}, not bool"
    outside = tree.mask & ((tree.tokens < 0) | (tree.tokens >= classes))
    assert not outside.any(), f"token {tree.tokens[outside][:1].tolist()} of {classes} classes"
    parents = tree.shape.parents.expand(rows, -1)
    orphans = tree.mask & (parents >= 0) & ~tree.mask.gather(1, parents.clamp(min=0))
    assert not orphans.any(), f"row, node {orphans.nonzero()[:1].tolist()} hangs below padding"
    if tree.logp is not None:
        assert tree.logp.shape == (rows, nodes, classes), f"logp is {tuple(tree.logp.shape)}"
        totals = tree.logp[tree.mask].exp().sum(-1)
        assert ((totals - 1).abs() < 1e-3).all(), "logp holds no log-probs: they must sum to 1"


def assert_shape(tree: DraftTree) -> None:
    """Assert that parents come before children, and that depth and sees say what parents do."""
    parents, nodes = tree.shape.parents, tree.tokens.shape[1]
    assert parents.shape[0] in (1, len(tree.tokens)), f"parents are {tuple(parents.shape)}"
    assert parents.shape[1] == nodes, f"{parents.shape[1]} parents for {nodes} nodes"
    misplaced = (parents < -1) | (parents >= torch.arange(nodes, device=parents.device))
    assert not misplaced.any(), f"a parent must come before its child: {parents.tolist()}"
    expected = shape_of(parents)
    for name in (field.name for field in fields(expected)):
        found, wanted = getattr(tree.shape, name), getattr(expected, name)
        same(found, wanted, f"the shape's {name} are not those of its parents")


def assert_siblings_distinct(tree: DraftTree) -> None:
    """Assert that no two children of one node carry the same token."""
    nodes = tree.tokens.shape[1]
    parents = tree.shape.parents.expand(len(tree.tokens), -1)
    twins = (parents[:, :, None] == parents[:, None]) & tree.mask[:, :, None] & tree.mask[:, None]
    twins &= tree.tokens[:, :, None] == tree.tokens[:, None]
    twins &= ~torch.eye(nodes, dtype=torch.bool, device=parents.device)
    assert not twins.any(), f"siblings carry one token: row, nodes {twins.nonzero()[:1].tolist()}"


def row_of(tree: DraftTree, row: int) -> list[tuple[int, ...]] | Tensor:
    """What a row proposes, as rows of trees that are laid out differently compare.

    Fixed candidates: each node as its tokens from the root down, sorted. Sampled ones: the
    log-probs [V] that the first node was drawn from, for a row draws other numbers in a batch.
    """
    nodes = tree.mask[row].nonzero().flatten()
    if tree.logp is not None and len(nodes):
        return tree.logp[row, nodes[0]]
    sees = tree.shape.sees.expand(len(tree.tokens), -1, -1)[row, 1:, 1:]
    return sorted(tuple(tree.tokens[row, sees[node]].tolist()) for node in nodes.tolist())


def assert_alike(
    left: list[tuple[int, ...]] | Tensor, right: list[tuple[int, ...]] | Tensor, otherwise: str
) -> None:
    """Assert that two rows propose the same, log-probs up to float32's rounding."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        gap = (left - right).abs().max()
        assert gap < 1e-3, f"{otherwise}: log-probs differ by up to {gap:.3g}"
    else:
        assert left == right, f"{otherwise}: {left} and {right}"


def p_value(counts: Mapping[Any, float], chances: Mapping[Any, float]) -> float:
    """The chance of a fit as bad as that of the counts, if outcomes have these chances.

    Outcomes expected less than ten times are pooled. One that cannot be must not have come.
    """
    assert abs(sum(chances.values()) - 1) < 1e-5
    if any(chances.get(outcome, 0.0) == 0.0 for outcome, count in counts.items() if count):
        return 0.0
    draws = sum(counts.values())
    cells: dict[Any, tuple[float, float]] = {}
    for outcome, chance in chances.items():
        if chance == 0:
            continue
        cell = outcome if chance * draws >= 10 else "pool"
        count, expected = cells.get(cell, (0.0, 0.0))
        cells[cell] = (count + counts.get(outcome, 0.0), expected + chance * draws)
    if len(cells) == 1:
        return 1.0  # there was nothing that could have come otherwise
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells.values())
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
