"""The trees `bestfirst` and `autotune` against every tree; and `backbone` at its widest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.decoding.tree import DraftTree, is_chain
from kdcore_baselines.drafting_components import (
    AutotuneParams,
    BestFirstParams,
    DynamicParams,
)
from kdcore_baselines.trees import Autotune, Backbone, BestFirst, Dynamic

Path = tuple[int, ...]
BOTH = torch.ones(2, dtype=torch.bool)


def built(nodes: int, logp: Tensor) -> DraftTree:
    return BestFirst(BestFirstParams(nodes=nodes), None)(logp, BOTH)


def paths_of(tree: DraftTree, row: int) -> list[Path]:
    """The tokens from the root to each node."""
    sees = tree.shape.sees[row, 1:, 1:]
    return [tuple(tree.tokens[row, sees[n]].tolist()) for n in tree.mask[row].nonzero()[:, 0]]


def every_path(depth: int, classes: int) -> list[Path]:
    lengths = range(1, depth + 1)
    return [p for n in lengths for p in itertools.product(range(classes), repeat=n)]


def chance(path: Path, levels: Tensor) -> float:
    return levels[range(len(path)), path].sum().exp().item()


def levels(depth: int, classes: int) -> Tensor:
    random = torch.Generator().manual_seed(depth)
    normal = torch.randn(2, depth, classes, generator=random, dtype=torch.float64)
    return (2 * normal).log_softmax(-1)


@pytest.mark.parametrize("nodes", range(1, 13))
def test_no_tree_of_as_many_nodes_expects_more_tokens(nodes: int) -> None:
    """Of all trees over two levels of three classes: 12 nodes there are, 6 of them at most 924."""
    logp = levels(2, 3)
    tree = built(nodes, logp)
    for row in range(2):
        most = max(
            sum(chance(path, logp[row]) for path in chosen)
            for chosen in itertools.combinations(every_path(2, 3), nodes)
            if all(path[:-1] in ((), *chosen) for path in chosen)
        )
        found = paths_of(tree, row)
        assert len(set(found)) == nodes
        assert sum(chance(path, logp[row]) for path in found) == pytest.approx(most, rel=1e-12)


@pytest.mark.parametrize(("depth", "classes", "nodes"), [(3, 4, 30), (4, 3, 64), (5, 2, 9)])
def test_its_nodes_are_the_likeliest_paths_in_order(depth: int, classes: int, nodes: int) -> None:
    logp = levels(depth, classes)
    tree = built(nodes, logp)
    for row in range(2):
        paths = every_path(depth, classes)
        expected = sorted(paths, key=lambda path: -chance(path, logp[row]))
        assert paths_of(tree, row) == expected[:nodes]


def test_a_budget_beyond_all_paths_is_padded() -> None:
    tree = built(20, levels(2, 3))
    assert tree.mask.tolist() == [[True] * 12 + [False] * 8] * 2
    assert set(paths_of(tree, 0)) == set(every_path(2, 3))


def test_excluded_classes_come_last() -> None:
    """Of a probability of exactly 0, below which the sums cannot fall."""
    logp = levels(2, 4)
    logp[:, :, 1:3] = -torch.inf
    likely = [path for path in every_path(2, 4) if {*path} <= {0, 3}]
    assert {*paths_of(built(6, logp), 0)} == {*likely}
    assert {*paths_of(built(20, logp), 0)} == {*every_path(2, 4)}


def priced(cost: Callable[[int], float], most: int = 12) -> Autotune:
    tree = Autotune(AutotuneParams(most=most), None)
    tree.tune(lambda: cost)
    return tree


@pytest.mark.parametrize("per_row", [0.0, 0.02, 0.1, 0.3, 0.5, 2.0])
def test_the_tuned_size_promises_the_most_tokens_a_second(per_row: float) -> None:
    logp = levels(3, 4)
    cost = lambda rows: 1 + per_row * rows  # noqa: E731
    rates = {0: 2 / cost(2)}
    for nodes in range(1, 13):
        tree = built(nodes, logp)
        chances = [chance(path, logp[row]) for row in range(2) for path in paths_of(tree, row)]
        rates[nodes] = (2 + sum(chances)) / cost(2 * (1 + nodes))
    best = max(rates, key=lambda nodes: rates[nodes])
    assert priced(cost)(logp, BOTH).tokens.shape[1] == best


SIZES: dict[str, tuple[Callable[[int], float], int]] = {
    "rows cost nothing": (lambda rows: 1.0, 12),
    "a second row costs a little": (
        lambda rows: 1.0 if rows == 2 else 1.2 if rows == 4 else 9.0,
        1,
    ),
    "rows are dear": (lambda rows: float(rows**4), 0),
    "rows are dear beside a slow proposal": (lambda rows: 4 + float(rows**4), 0),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("grown", [False, True])
def test_it_takes_no_node_or_one_or_many_by_the_cost(case: str, grown: bool) -> None:
    cost, expected = SIZES[case]
    tree = priced(cost)
    assert built_by(tree, grown).tokens.shape[1] == expected
    tree.account = None  # as a decoder sets it that measures drafts
    assert built_by(tree, grown).tokens.shape[1] == max(expected, 1)


def built_by(tree: Autotune, grown: bool) -> DraftTree:
    logp = levels(3, 4)
    if not grown:
        return tree(logp, BOTH)
    later = iter(logp.unbind(1)[1:])

    def following(places: Tensor, tokens: Tensor) -> Tensor:
        return next(later)[:, None].expand(-1, tokens.shape[1], -1)

    return tree.grow(logp[:, 0], following, 3, BOTH)


@pytest.mark.parametrize("per_row", [0.02, 0.1, 0.3])
def test_a_grown_tree_has_the_likeliest_candidates_of_a_dynamic_one(per_row: float) -> None:
    tree = priced(lambda rows: 1 + per_row * rows, most=31)
    found = built_by(tree, grown=True)
    size = found.tokens.shape[1]
    same = Dynamic(DynamicParams(beams=10, nodes=size), None)(levels(3, 4), BOTH)
    assert 0 < size < 31
    for row in range(2):
        assert paths_of(found, row) == paths_of(same, row)


def test_rows_that_do_not_propose_expect_nothing() -> None:
    tree = priced(lambda rows: 1.0)
    assert tree(levels(2, 3), ~BOTH).tokens.shape == (2, 0)


def test_a_tree_is_measured_once() -> None:
    tree = priced(lambda rows: 1.0)
    tree.tune(lambda: pytest.fail("measured again"))


def test_a_backbone_wider_than_the_vocabulary_has_all_of_it() -> None:
    logp = levels(2, 3)
    grown = Backbone(9).grow(logp[:, 0], lambda places, tokens: logp[:, 1:2], 2, BOTH)
    for tree in (Backbone(9)(logp, BOTH), grown):
        assert tree.tokens.shape == (2, 6)
        assert tree.tokens.view(2, 2, 3).sort(-1).values.tolist() == [[[0, 1, 2]] * 2] * 2


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "tree_of",
    [
        Backbone,
        lambda size: BestFirst(BestFirstParams(nodes=size), None),
        lambda size: Autotune(AutotuneParams(most=size), None),
        lambda size: Dynamic(DynamicParams(beams=size, nodes=9), None),
        lambda size: Dynamic(DynamicParams(beams=9, nodes=size), None),
    ],
)
def test_a_tree_says_that_it_branches_where_its_sizes_let_it(
    tree_of: Callable[[int], Any], size: int
) -> None:
    tree = tree_of(size)
    even = torch.zeros(2, 3, 9).log_softmax(-1)  # no deeper node is as likely as a sibling
    assert tree.branches == (size > 1) == (not is_chain(tree(even, BOTH).shape))
