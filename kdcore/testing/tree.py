"""What a tree builder must hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.tree import is_chain
from kdcore.method.protocols import TreeGrower
from kdcore.method.records import LOG_ZERO, DraftTree
from kdcore.testing.draft_trees import (
    assert_alike,
    assert_form,
    assert_shape,
    assert_siblings_distinct,
    row_of,
)
from kdcore.testing.suite import Suite, same

ROWS, DEPTH, CLASSES = 4, 5, 128


class TreeSuite(Suite):
    """The checks of a `TreeBuilder`, and of a `TreeGrower` where it is one."""

    kind = "tree"

    def test_parents_come_before_children(self) -> None:
        """The pass that scores a tree and the walk down it read the nodes in their order."""
        for depth in (1, 2, DEPTH):
            assert_shape(self.built(levels(depth=depth)))

    def test_siblings_are_distinct(self) -> None:
        """Twins would be two candidates where a verifier counts one."""
        for logp in (levels(), narrow()):
            assert_siblings_distinct(self.built(logp))

    def test_a_tree_has_the_form_of_its_record(self) -> None:
        """Dtypes and sizes, tokens that exist, no node below padding, log-probs that sum to 1."""
        for logp in (levels(), levels(depth=1), narrow()):
            assert_form(self.built(logp), ROWS, CLASSES)

    def test_a_row_that_is_not_active_proposes_nothing(self) -> None:
        """A finished row stays in the batch; an active one proposes something."""
        active = torch.tensor([True, False, True, False])
        tree = self.component()(levels(), active)
        same(tree.mask.any(1), active, "the rows with nodes in the mask are not the active ones")

    def test_no_node_is_deeper_than_the_levels(self) -> None:
        """There is no distribution to draw it from."""
        for depth in (1, 2, DEPTH):
            tree = self.built(levels(depth=depth))
            deepest = int((tree.shape.depth[:, 1:] * tree.mask).max())
            assert deepest <= depth, f"{depth} levels gave nodes at depth {deepest}"

    def test_rows_do_not_see_each_other(self) -> None:
        """A row's tree is the one it gets alone."""
        together = self.built(levels())
        for row in range(ROWS):
            alone = self.built(levels()[row : row + 1])
            assert_alike(row_of(together, row), row_of(alone, 0), f"row {row} is another alone")

    def test_a_tree_that_branches_says_so(self) -> None:
        """A verifier that follows a single chain is refused by it before anything is decoded."""
        says = getattr(self.component(), "branches", False)
        assert isinstance(says, bool), f"branches is {says!r}"
        chain = is_chain(self.built(levels()).shape)
        assert chain or says, "it gives a node several children, and does not say that it branches"

    def test_the_levels_are_left_alone(self) -> None:
        """The drafter may still need them."""
        logp = levels()
        self.built(logp)
        same(logp, levels(), "the tree wrote into the log-probs")

    def test_it_grows_below_what_it_asked_about(self) -> None:
        """Of a tree that grows (`TreeGrower`); its form is that of one over known levels."""
        component = self.component()
        if not isinstance(component, TreeGrower):
            return
        random = torch.Generator().manual_seed(1)
        after = (2 * torch.randn(CLASSES, CLASSES, generator=random)).log_softmax(-1)
        asked: list[list[list[tuple[int, ...]]]] = [[[()]] for _ in range(ROWS)]

        def following(places: Tensor, tokens: Tensor) -> Tensor:
            for paths, above, new in zip(asked, places.tolist(), tokens.tolist(), strict=True):
                paths.append([(*paths[-1][p], token) for p, token in zip(above, new, strict=True)])
            return after[tokens]

        active = torch.tensor([True, True, False, True])
        tree = component.grow(levels()[:, 0], following, DEPTH, active)
        assert_form(tree, ROWS, CLASSES)
        assert_shape(tree)
        assert_siblings_distinct(tree)
        same(tree.mask.any(1), active, "the rows with nodes in the mask are not the active ones")
        for row, paths in enumerate(asked):
            assert len(paths) <= DEPTH, f"{len(paths) - 1} calls for {DEPTH} levels"
            known = {path for call in paths for path in call}
            for path in row_of(tree, row):
                assert tuple(path[:-1]) in known, f"{path} grew where nothing was asked"

    def built(self, logp: Tensor) -> DraftTree:
        """The tree of a new component over log-probs [B, D, V], all rows active."""
        tree: DraftTree = self.component()(logp, torch.ones(len(logp), dtype=torch.bool))
        return tree

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """The tree of that step's levels."""
        tree = component(levels(seed=step), torch.ones(ROWS, dtype=torch.bool))
        return [tree.tokens, tree.mask, tree.shape.parents]


def levels(seed: int = 0, depth: int = DEPTH) -> Tensor:
    """Log-probs [B, D, V] of an unsure drafter."""
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(ROWS, depth, CLASSES, generator=random)).log_softmax(-1)


def narrow() -> Tensor:
    """Log-probs of which all but one class at each depth are excluded."""
    logp = torch.full((ROWS, DEPTH, CLASSES), LOG_ZERO)
    return logp.scatter(2, levels().argmax(-1, keepdim=True), 0.0)
