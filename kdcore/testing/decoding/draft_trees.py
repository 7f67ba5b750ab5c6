"""Assertions on draft trees, for the suites of trees and drafters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.testing.suite import same


def assert_form(tree: DraftTree, rows: int, classes: int) -> None:
    """Assert the dtypes and sizes of a tree, and that no masked node is below padding.

    Args:
        tree: The tree, whose shape `assert_shape` checks.
        rows: B.
        classes: V.
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
    assert not orphans.any(), f"row, node {orphans.nonzero()[:1].tolist()} is below padding"
    if tree.logp is not None:
        assert tree.logp.shape == (rows, nodes, classes), f"logp is {tuple(tree.logp.shape)}"
        totals = tree.logp[tree.mask].exp().sum(-1)
        assert ((totals - 1).abs() < 1e-3).all(), "the probabilities of logp do not sum to 1"


def assert_shape(tree: DraftTree) -> None:
    """Assert that parents come before children, and that depth and sees agree with parents."""
    parents, nodes = tree.shape.parents, tree.tokens.shape[1]
    assert parents.shape[0] in (1, len(tree.tokens)), f"parents are {tuple(parents.shape)}"
    assert parents.shape[1] == nodes, f"{parents.shape[1]} parents for {nodes} nodes"
    misplaced = (parents < -1) | (parents >= torch.arange(nodes, device=parents.device))
    assert not misplaced.any(), f"a parent must come before its child: {parents.tolist()}"
    expected = shape_of(parents)
    for name in ("depth", "sees"):
        found, wanted = getattr(tree.shape, name), getattr(expected, name)
        same(found, wanted, f"the shape's {name} does not agree with its parents")
    found, wanted = tree.shape.levels, expected.levels
    assert found >= wanted, f"the shape has {found} levels, but its parents have {wanted}"


def assert_siblings_distinct(tree: DraftTree) -> None:
    """Assert that no two children of a node have the same token."""
    nodes = tree.tokens.shape[1]
    parents = tree.shape.parents.expand(len(tree.tokens), -1)
    twins = (parents[:, :, None] == parents[:, None]) & tree.mask[:, :, None] & tree.mask[:, None]
    twins &= tree.tokens[:, :, None] == tree.tokens[:, None]
    twins &= ~torch.eye(nodes, dtype=torch.bool, device=parents.device)
    assert not twins.any(), f"siblings have equal tokens: row, nodes {twins.nonzero()[:1].tolist()}"


def row_of(tree: DraftTree, row: int) -> list[tuple[int, ...]] | Tensor:
    """Return a row's proposals in a form that does not depend on the layout of the tree.

    Args:
        tree: The tree.
        row: The index of the row.

    Returns:
        Of fixed candidates, the sorted paths of tokens from the root. Of sampled candidates, the
        log-probs [V] of the first node, because a row samples other tokens in another batch.
    """
    nodes = tree.mask[row].nonzero().flatten()
    if tree.logp is not None and len(nodes):
        return tree.logp[row, nodes[0]]
    sees = tree.shape.sees.expand(len(tree.tokens), -1, -1)[row, 1:, 1:]
    return sorted(tuple(tree.tokens[row, sees[node]].tolist()) for node in nodes.tolist())


def assert_alike(
    left: list[tuple[int, ...]] | Tensor, right: list[tuple[int, ...]] | Tensor, otherwise: str
) -> None:
    """Assert that two rows have the same proposals, log-probs up to float32's rounding."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        gap = (left - right).abs().max()
        assert gap < 1e-3, f"{otherwise}: log-probs differ by up to {gap:.3g}"
    else:
        assert left == right, f"{otherwise}: {left} and {right}"


def p_value(counts: Mapping[Any, float], chances: Mapping[Any, float]) -> float:
    """Compute the p-value of a chi-square test.

    Outcomes with an expected count below ten are pooled; an impossible outcome gives 0.

    Args:
        counts: Outcome -> count.
        chances: Outcome -> probability.

    Returns:
        The probability of a fit at least as bad as that of the counts.
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
        return 1.0  # only one outcome is possible
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells.values())
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
