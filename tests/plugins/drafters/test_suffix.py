"""The suffix drafter: its trees by hand, its counts by brute force, and what it remembers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kdcore.decoding.tree import DraftTree
from kdcore.testing import DrafterSuite
from kdcore_baselines.drafters.suffix import Suffix, Trie, grown
from kdcore_baselines.drafting_components import SuffixParams

NO_FEATURES = torch.empty(0)


class TestRemembering(DrafterSuite):
    """Lossless all the same."""

    name = "suffix"
    params = {"remember": 2, "least": 0.0}  # noqa: RUF012

    def test_drafts_depend_on_committed_tokens_alone(self) -> None:
        """They depend on earlier rows too."""


def drafted(rows: list[list[int]], drafter: Suffix | None = None, **params: Any) -> DraftTree:
    drafter = drafter or Suffix(SuffixParams(**params), None)
    length = max(map(len, rows)) - 1
    drafter.start(torch.tensor([row[0] for row in rows]))
    rest = torch.tensor([row[1:] + [0] * (length - len(row) + 1) for row in rows]).long()
    return drafter.propose(rest, NO_FEATURES, torch.tensor([len(row) - 1 for row in rows]), None)


def paths(tree: DraftTree, row: int = 0) -> set[tuple[int, ...]]:
    """The tokens from the root to each node."""
    parents = tree.shape.parents[row if len(tree.shape.parents) > 1 else 0].tolist()
    tokens, found = tree.tokens[row].tolist(), set()
    for node, real in enumerate(tree.mask[row].tolist()):
        path = []
        while real and node >= 0:
            path.append(tokens[node])
            node = parents[node]
        found |= {tuple(reversed(path))} if path else set()
    return found


def test_a_long_match_gets_a_chain_and_an_ambiguous_one_a_tree() -> None:
    once = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert paths(drafted([once])) == {(5,), (5, 6), (5, 6, 7), (5, 6, 7, 8)}
    twice = [7, 1, 8, 7, 1, 9, 5, 7, 1]
    assert paths(drafted([twice])) == {(8,), (9,)}
    assert paths(drafted([twice], factor=2.0)) == {(8,), (9,), (8, 7), (9, 5)}
    assert paths(drafted([twice], nodes=1)) == {(8,)}
    assert paths(drafted([twice], least=0.6)) == set()


def test_a_row_without_a_match_or_a_token_proposes_nothing() -> None:
    tree = drafted([[1, 2, 3, 4], [5], [6, 6, 6, 6]])
    assert [len(paths(tree, row)) for row in range(3)] == [0, 0, 2]
    assert drafted([[1, 2, 3]]).tokens.shape == (1, 0)


def test_no_tree_of_another_length_or_shape_expects_more() -> None:
    """Against counting every piece of the row, and growing by the definition."""
    noise = random.Random(0)
    for _ in range(20):
        row = [noise.randrange(3) for _ in range(30)]
        tree = drafted([row], depth=8, nodes=5, factor=1.0, least=0.05)
        found = sum(chance(row, path, match) for path, match in with_match(row, paths(tree)))
        best = max(expected(row, length, min(5, length), 8) for length in range(1, 9))
        assert found == pytest.approx(best)


def counts_after(row: list[int], piece: tuple[int, ...]) -> dict[int, int]:
    found: dict[int, int] = {}
    for end in range(len(piece), len(row)):
        if tuple(row[end - len(piece) : end]) == piece:
            found[row[end]] = found.get(row[end], 0) + 1
    return found


def chance(row: list[int], path: tuple[int, ...], match: int) -> float:
    """D of a path after the last ``match`` tokens."""
    product, piece = 1.0, tuple(row[-match:])
    for token in path:
        after = counts_after(row, piece)
        product *= after.get(token, 0) / max(1, sum(after.values()))
        piece = (*piece, token)
    return product


def expected(row: list[int], match: int, most: int, depth: int) -> float:
    """The largest sum of D of ``most`` nodes after a match."""
    every: list[float] = []

    def walk(path: tuple[int, ...]) -> None:
        if match + len(path) >= depth:
            return
        for token in counts_after(row, (*row[-match:], *path)):
            value = chance(row, (*path, token), match)
            if value >= 0.05:
                every.append(value)
                walk((*path, token))

    walk(())
    return sum(sorted(every, reverse=True)[:most])


def with_match(row: list[int], found: set[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
    """Each path with the match whose D sum is the largest for the whole tree."""
    best = max(
        (n for n in range(1, 9) if min(5, n) >= len(found)),
        key=lambda n: sum(chance(row, path, n) for path in found),
    )
    return [(path, best) for path in found]


def test_it_remembers_as_many_rows_as_it_is_told_and_forgets_them_whole() -> None:
    drafter = Suffix(SuffixParams(remember=1), None)
    drafted([[1, 2, 3, 4, 5]], drafter)
    assert (4,) in paths(drafted([[9, 2, 3]], drafter))
    assert paths(drafted([[7, 8]], drafter)) == set()  # only the row [9, 2, 3] is left
    drafted([[6]], drafter)
    assert list(drafter.kept) == [[7, 8]]
    assert set(drafter.shared.root.children) == {7, 8}


def test_a_draft_grows_by_the_product_of_the_shares() -> None:
    trie, ending = Trie(3), []
    for token in (1, 2, 1, 2, 1, 3):
        ending = trie.add(token, ending)
    draft = grown(trie.root.children[1], 3, 0.0)
    assert draft.tokens == [2, 1, 3] and draft.parents == [-1, 0, -1]
    assert draft.score == pytest.approx(2 / 3 + 2 / 3 + 1 / 3)
