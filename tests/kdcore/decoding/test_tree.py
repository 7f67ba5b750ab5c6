import numpy as np
import pytest
import torch

from kdcore.decoding.tree import DraftTree, backbone, chain, shape_of, walk
from tests.reference.drafting import speculative

CPU = torch.device("cpu")


def random_parents(random: np.random.Generator, nodes: int) -> list[int]:
    """As the reference numbers them: the root is 0, and its parent is -1."""
    return [-1] + [int(random.integers(node)) for node in range(1, nodes + 1)]


@pytest.mark.parametrize("nodes", [0, 1, 2, 9, 40])
def test_shape_has_the_references_mask_and_depths(nodes: int) -> None:
    random = np.random.default_rng(nodes)
    rows = [random_parents(random, nodes) for _ in range(3)]
    shape = shape_of(torch.tensor(rows)[:, 1:] - 1)
    assert shape.depth.tolist() == [speculative.depths(parents) for parents in rows]
    for sees, parents in zip(shape.sees, rows, strict=True):
        assert np.array_equal(sees.numpy(), speculative.ancestor_mask(parents))


@pytest.mark.parametrize(("depth", "k"), [(7, 10), (3, 1), (1, 4), (0, 1)])
def test_backbone_has_the_references_parents(depth: int, k: int) -> None:
    parents = speculative.backbone_parents(depth, k)
    assert (backbone(depth, k, CPU).parents[0] + 1).tolist() == parents[1:]


def test_a_static_shape_is_made_once() -> None:
    assert chain(4, CPU) is backbone(4, 1, CPU)


def test_walk_follows_the_choice_of_each_row_until_it_leaves_the_tree() -> None:
    # 0 and 1 below the root, 2 and 3 below 1
    shape = shape_of(torch.tensor([[-1, -1, 1, 1]]))
    tokens = torch.tensor([[7, 8, 7, 9]]).expand(4, -1)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3, 3] = False
    choices = torch.tensor(
        [
            [8, 0, 9, 0, 3],  # to 1, to 3, then 3
            [7, 4, 0, 0, 0],  # to 0, then 4
            [6, 0, 0, 0, 0],  # nowhere
            [8, 0, 9, 0, 3],  # to 1; node 3 is padding
        ]
    )
    asked: list[list[int]] = []

    def choose(slot):
        asked.append(slot.tolist())
        return choices[torch.arange(4), slot]

    verdict = walk(DraftTree(tokens, shape, mask), choose)
    assert verdict.path.tolist() == [[1, 3], [0, -1], [-1, -1], [1, -1]]
    assert verdict.accepted.tolist() == [2, 1, 0, 1]
    assert verdict.token.tolist() == [3, 4, 6, 9]
    assert len(asked) == 3


def test_walk_of_an_empty_tree_is_the_choice_at_the_root() -> None:
    tree = DraftTree(torch.zeros(2, 0).long(), chain(0, CPU), torch.zeros(2, 0).bool())
    verdict = walk(tree, lambda slot: slot + 5)
    assert verdict.path.shape == (2, 0)
    assert verdict.token.tolist() == [5, 5]
