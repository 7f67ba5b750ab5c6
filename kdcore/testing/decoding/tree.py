"""The conformance suite of tree builders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.protocols import TreeGrower
from kdcore.decoding.tree import DraftTree, is_chain
from kdcore.method.records import LOG_ZERO
from kdcore.testing.decoding.draft_trees import (
    assert_alike,
    assert_form,
    assert_shape,
    assert_siblings_distinct,
    row_of,
)
from kdcore.testing.suite import Suite, same

ROWS, DEPTH, CLASSES = 4, 5, 128


class TreeSuite(Suite):
    """The checks of a `TreeBuilder`, and of a `TreeGrower` if the component is one."""

    kind = "tree"

    def test_parents_come_before_children(self) -> None:
        """The pass that scores a tree and the walk down it read the nodes in their order."""
        for depth in (1, 2, DEPTH):
            assert_shape(self.built(levels(depth=depth)))

    def test_siblings_are_distinct(self) -> None:
        """A verifier would count equal siblings as two candidates."""
        for logp in (levels(), narrow()):
            assert_siblings_distinct(self.built(logp))

    def test_a_tree_has_the_form_of_its_record(self) -> None:
        """Dtypes, sizes and tokens are right, and no node is below padding."""
        for logp in (levels(), levels(depth=1), narrow()):
            assert_form(self.built(logp), ROWS, CLASSES)

    def test_a_row_that_is_not_active_proposes_nothing(self) -> None:
        """A finished row stays in the batch without proposals; an active one has some."""
        active = torch.tensor([True, False, True, False])
        tree = self.component()(levels(), active)
        same(tree.mask.any(1), active, "the rows with nodes in the mask are not the active ones")

    def test_no_node_is_deeper_than_the_levels(self) -> None:
        """The drafter has no distribution for a deeper node."""
        for depth in (1, 2, DEPTH):
            tree = self.built(levels(depth=depth))
            deepest = int((tree.shape.depth[:, 1:] * tree.mask).max())
            assert deepest <= depth, f"{depth} levels gave nodes at depth {deepest}"

    def test_rows_do_not_see_each_other(self) -> None:
        """A row gets the same tree in a batch as alone."""
        together = self.built(levels())
        for row in range(ROWS):
            alone = self.built(levels()[row : row + 1])
            assert_alike(row_of(together, row), row_of(alone, 0), f"row {row} differs alone")

    def test_a_tree_that_branches_says_so(self) -> None:
        """A run refuses a branching tree for a verifier of single chains before it decodes."""
        says = getattr(self.component(), "branches", False)
        assert isinstance(says, bool), f"branches is {says!r}"
        chain = is_chain(self.built(levels()).shape)
        assert chain or says, "a node has several children: set branches = True"

    def test_the_levels_are_left_alone(self) -> None:
        """It does not change the log-probs, which the drafter may still need."""
        logp = levels()
        self.built(logp)
        same(logp, levels(), "the tree changed the log-probs")

    def test_it_grows_below_what_it_asked_about(self) -> None:
        """A `TreeGrower` adds nodes only below tokens whose successors it read."""
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
                assert tuple(path[:-1]) in known, f"{path} is below a token that was not read"

    def built(self, logp: Tensor) -> DraftTree:
        """Build the tree of a new component over log-probs [B, D, V], with all rows active."""
        tree: DraftTree = self.component()(logp, torch.ones(len(logp), dtype=torch.bool))
        return tree

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Build the tree of the step's levels."""
        tree = component(levels(seed=step), torch.ones(ROWS, dtype=torch.bool))
        return [tree.tokens, tree.mask, tree.shape.parents]


def levels(seed: int = 0, depth: int = DEPTH) -> Tensor:
    """Return log-probs [B, D, V] with a high entropy."""
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(ROWS, depth, CLASSES, generator=random)).log_softmax(-1)


def narrow() -> Tensor:
    """Return log-probs [B, D, V] with all but one class excluded at each depth."""
    logp = torch.full((ROWS, DEPTH, CLASSES), LOG_ZERO)
    return logp.scatter(2, levels().argmax(-1, keepdim=True), 0.0)
