"""Verifiers against the exact distribution of what a round emits, and against planted mutants."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.decoding.protocols import Verifier
from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import DraftTree, Verdict, chain, shape_of
from kdcore.errors import UserError
from kdcore.testing.decoding.draft_trees import p_value
from kdcore_baselines.drafting_components import TypicalParams
from kdcore_baselines.verifiers import ChainSampling, Greedy, Sampling, Typical
from tests.reference.drafting import speculative
from tests.reference.softmax import softmax

CLASSES = 5
DRAWS = 200_000
GREEDY, SAMPLING, CHAIN = Greedy(None, None), Sampling(None, None), ChainSampling(None, None)
TYPICAL = Typical(TypicalParams(), None)

# 0 is the root
PARENTS = [-1, 0, 0, 1, 1, 3, 2]
TOKENS = [-1, 2, 0, 1, 4, 0, 3]


def target(before: tuple[int, ...]) -> np.ndarray:
    """A distribution for each sequence of tokens."""
    seed = sum((token + 1) * 7**place for place, token in enumerate(before))
    return softmax(1.5 * np.random.default_rng(seed).normal(size=CLASSES))


def levels(depth: int) -> np.ndarray:
    random = np.random.default_rng(3)
    return np.stack([softmax(random.normal(size=CLASSES)) for _ in range(depth)])


class Bench:
    """R rows of one tree, and the target's log-probs after each of its slots."""

    def __init__(self, tokens: list[int], parents: list[int], rows: int = DRAWS) -> None:
        paths = [speculative.path_to(node, parents) for node in range(len(parents))]
        table = np.stack([target(tuple(tokens[n] for n in path)) for path in paths])
        self.table = torch.tensor(table).log().float()
        self.tree = DraftTree(
            torch.tensor([tokens[1:]], dtype=torch.int64).expand(rows, -1),
            shape_of(torch.tensor([parents[1:]], dtype=torch.int64) - 1),
            torch.ones(rows, len(tokens) - 1, dtype=torch.bool),
        )

    def logp(self, slots: Tensor) -> Tensor:
        return self.table[slots]


class SampledChain:
    """R rows, each a chain of its own sampled from `levels`."""

    def __init__(self, depth: int) -> None:
        self.generator = torch.Generator().manual_seed(11)
        draft = torch.tensor(levels(depth)).expand(DRAWS, -1, -1)
        tokens = draw(draft, self.generator)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        self.tree = DraftTree(tokens, chain(depth, tokens.device), mask, draft.log().float())
        self.tables = [
            torch.tensor(
                np.array([target(b) for b in itertools.product(range(CLASSES), repeat=place)])
            )
            for place in range(depth + 1)
        ]

    def logp(self, slots: Tensor) -> Tensor:
        """Every row is asked for one and the same slot."""
        place = int(slots[0, 0])
        before = torch.zeros(DRAWS, dtype=torch.int64)
        for token in self.tree.tokens[:, :place].unbind(1):
            before = before * CLASSES + token
        return self.tables[place][before].log().float()[:, None]


def outcomes(verdict: Verdict, tree: DraftTree) -> Counter:
    """How often each sequence of emitted tokens came."""
    path = tree.tokens.gather(1, verdict.path.clamp(min=0)).masked_fill(verdict.path < 0, -1)
    emitted = torch.cat([path, verdict.token[:, None]], dim=1)
    rows, counts = emitted.unique(dim=0, return_counts=True)
    total: Counter = Counter()
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        total[tuple(token for token in row if token >= 0)] += count
    return total


def run(verifier: Verifier, bench: Bench | SampledChain) -> Counter:
    verdict = verifier(bench.tree, bench.logp, torch.Generator().manual_seed(5))
    return outcomes(verdict, bench.tree)


def first_tokens(emitted: Counter) -> dict[int, int]:
    total = dict.fromkeys(range(CLASSES), 0)
    for sequence, count in emitted.items():
        total[sequence[0]] += count
    return total


# planted mutants


class Redrawing:
    """Wrong: what replaces a refused token is drawn from the whole target."""

    lossless = True

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __call__(self, tree, logp, generator) -> Verdict:
        verdict = self.verifier(tree, logp, generator)
        end = verdict.path.max(1).values + 1  # the only slot asked for in the tests below
        again = torch.zeros_like(verdict.token)
        for slot in end.unique():
            rows = end == slot
            probs = logp(torch.full((len(end), 1), int(slot)))[:, 0].exp()
            again[rows] = draw(probs, generator)[rows]
        return replace(verdict, token=again)


class Misinformed:
    """Wrong: the draft is taken to have been sampled uniformly."""

    lossless = True

    def __call__(self, tree, logp, generator) -> Verdict:
        uniform = torch.full_like(tree.logp, -math.log(CLASSES))
        return CHAIN(replace(tree, logp=uniform), logp, generator)


class Eager:
    """Wrong: a drafted token is kept although the target is less sure of it."""

    lossless = True

    def __call__(self, tree, logp, generator) -> Verdict:
        return CHAIN(tree, lambda slots: (logp(slots) * 0.9).log_softmax(-1), generator)


# the exact distribution of a round


def test_sampling_emits_what_trying_candidates_in_order_would() -> None:
    exact = speculative.tree_outcomes(TOKENS, PARENTS, target)
    assert p_value(run(SAMPLING, Bench(TOKENS, PARENTS)), exact) > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chain_sampling_emits_what_the_formula_says(depth: int) -> None:
    exact = speculative.chain_outcomes(levels(depth), target)
    assert p_value(run(CHAIN, SampledChain(depth)), exact) > 1e-3


def test_chain_sampling_takes_a_fixed_chain_as_drafted_with_certainty() -> None:
    tokens, parents = [-1, 2, 0, 1], [-1, 0, 1, 2]
    exact = speculative.tree_outcomes(tokens, parents, target)
    for verifier in (CHAIN, SAMPLING):
        assert p_value(run(verifier, Bench(tokens, parents)), exact) > 1e-3


def test_sampling_is_lossless_for_sampled_candidates_too() -> None:
    emitted = first_tokens(run(SAMPLING, SampledChain(1)))
    assert p_value(emitted, dict(enumerate(target(())))) > 1e-3


def test_the_mutants_are_found_out() -> None:
    tree, sampled = Bench(TOKENS, PARENTS), SampledChain(2)
    exact = speculative.tree_outcomes(TOKENS, PARENTS, target)
    exact_chain = speculative.chain_outcomes(levels(2), target)
    assert p_value(run(Redrawing(SAMPLING), tree), exact) < 1e-9
    for mutant in (Redrawing(CHAIN), Misinformed(), Eager()):
        emitted = run(mutant, sampled)
        assert p_value(emitted, exact_chain) < 1e-9
        assert p_value(first_tokens(emitted), dict(enumerate(target(())))) < 1e-9


def test_typical_is_not_lossless_and_says_so() -> None:
    assert not TYPICAL.lossless
    emitted = first_tokens(run(TYPICAL, Bench(TOKENS, PARENTS)))
    assert p_value(emitted, dict(enumerate(target(())))) < 1e-9
    assert all(verifier.lossless for verifier in (GREEDY, SAMPLING, CHAIN))


# choices without chance


def random_tree(random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Tokens and parents; siblings are distinct."""
    tokens, parents = [-1], [-1]
    for _ in range(int(random.integers(13))):
        parent = int(random.integers(len(parents)))
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        free = sorted(set(range(CLASSES)) - taken)
        if free:
            tokens.append(int(random.choice(free)))
            parents.append(parent)
    return tokens, parents


@pytest.mark.parametrize("seed", range(30))
def test_greedy_keeps_the_references_path(seed: int) -> None:
    tokens, parents = random_tree(np.random.default_rng(seed))
    bench = Bench(tokens, parents, rows=2)
    path, token = speculative.greedy(tokens, parents, bench.table.numpy())
    verdict = GREEDY(bench.tree, bench.logp, None)
    for row in range(2):
        assert [n + 1 for n in verdict.path[row].tolist() if n >= 0] == path
    assert verdict.token.tolist() == [token] * 2


@pytest.mark.parametrize("seed", range(30))
def test_typical_keeps_the_longest_typical_path_and_of_several_the_likeliest(seed: int) -> None:
    tokens, parents = random_tree(np.random.default_rng(seed))
    bench = Bench(tokens, parents, rows=2)
    probs = bench.table.double().exp().numpy()
    paths = [speculative.path_to(node, parents) for node in range(len(parents))]

    def typical(path: list[int]) -> bool:
        return all(speculative.typical_acceptance(probs[parents[n]])[tokens[n]] for n in path)

    def key(path: list[int]) -> tuple[int, float]:
        return len(path), math.fsum(math.log(probs[parents[n]][tokens[n]]) for n in path)

    best = max(filter(typical, paths), key=key)
    verdict = TYPICAL(bench.tree, bench.logp, torch.Generator().manual_seed(0))
    for row in range(2):
        assert [n + 1 for n in verdict.path[row].tolist() if n >= 0] == best


@pytest.mark.parametrize(
    "verifier", [GREEDY, SAMPLING, CHAIN, TYPICAL], ids=lambda v: type(v).__name__
)
def test_padding_nodes_are_never_kept(verifier: Verifier) -> None:
    likely = int(target(()).argmax())
    bench = Bench([-1, likely, 0], [-1, 0, 1], rows=400)
    mask = torch.ones_like(bench.tree.mask)
    mask[::2] = False
    mask[1::4, 1] = False
    verdict = verifier(replace(bench.tree, mask=mask), bench.logp, torch.Generator().manual_seed(0))
    assert (verdict.accepted <= mask.sum(1)).all()
    assert verdict.accepted[1::2].sum() > 0
    assert verdict.token.max() < CLASSES


@pytest.mark.parametrize(
    "verifier", [GREEDY, SAMPLING, CHAIN, TYPICAL], ids=lambda v: type(v).__name__
)
def test_an_empty_tree_gives_the_targets_own_token(verifier: Verifier) -> None:
    bench = Bench([-1], [-1])
    emitted = first_tokens(run(verifier, bench))
    if verifier is GREEDY:
        assert emitted[int(target(()).argmax())] == DRAWS
    else:
        assert p_value(emitted, dict(enumerate(target(())))) > 1e-3


def test_chain_sampling_refuses_a_tree_that_branches() -> None:
    bench = Bench(TOKENS, PARENTS, rows=1)
    with pytest.raises(UserError, match="chain"):
        CHAIN(bench.tree, bench.logp, None)
