"""The reference verification and trees against exact enumeration."""

import itertools
import math

import numpy as np
import pytest

from tests.reference.drafting import speculative
from tests.reference.softmax import softmax

CLASSES = 3


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def target(random):
    """A target whose distribution depends on every token before."""
    depth = 4
    table = {
        prefix: softmax(2 * random.normal(size=CLASSES))
        for length in range(depth + 1)
        for prefix in itertools.product(range(CLASSES), repeat=length)
    }
    return table.__getitem__


def levels_of(random: np.random.Generator, depth: int, classes: int = CLASSES) -> np.ndarray:
    return np.stack([softmax(random.normal(size=classes)) for _ in range(depth)])


def joint(target: speculative.Target, length: int) -> speculative.Outcomes:
    """The target's own distribution of `length` tokens."""
    return completed({(): 1.0}, target, length)


def completed(outcomes, target, length: int):
    """Outcomes drawn on by the target, or cut, to `length` tokens."""
    total = dict.fromkeys(itertools.product(range(CLASSES), repeat=length), 0.0)
    for emitted, chance in outcomes.items():
        for sequence in total:
            if sequence[: len(emitted)] == emitted[:length]:
                rest = range(len(emitted), length)
                total[sequence] += chance * math.prod(
                    target(sequence[:n])[sequence[n]] for n in rest
                )
    return total


# trees


def test_backbone_tree_of_seven_by_ten():
    parents = speculative.backbone_parents(7, 10)
    assert len(parents) == 71
    assert len(speculative.leaf_paths(parents)) == 64
    assert all(parent < node for node, parent in enumerate(parents))
    assert speculative.depths(parents) == [0] + [1 + n // 10 for n in range(70)]


def test_backbone_node_sees_itself_the_root_and_the_shallower_backbone():
    depth, k = 4, 3
    parents = speculative.backbone_parents(depth, k)
    sees = speculative.ancestor_mask(parents)
    for i in range(1, depth + 1):
        for r in range(k):
            node = 1 + (i - 1) * k + r
            backbone = [1 + (j - 1) * k for j in range(1, i)]
            assert list(np.flatnonzero(sees[node])) == sorted({0, *backbone, node})


@pytest.mark.parametrize("budget", [1, 2, 4, 5])
def test_best_tree_is_the_most_probable_prefixes(budget, random):
    levels = levels_of(random, 3)
    nodes, value = speculative.best_tree(levels, budget)
    every = [node for i in (1, 2, 3) for node in itertools.product(range(CLASSES), repeat=i)]
    chances = sorted(speculative.expected_acceptance({node}, levels) for node in every)
    assert value == pytest.approx(sum(chances[-budget:]))
    assert len(nodes) == budget
    assert all(node[:-1] == () or node[:-1] in nodes for node in nodes)


def test_best_tree_is_no_worse_than_the_backbone(random):
    levels = levels_of(random, 2)
    order = np.argsort(-levels, axis=1)[:, :2]
    backbone = {(int(x),) for x in order[0]}
    backbone |= {(int(order[0, 0]), int(x)) for x in order[1]}
    _, value = speculative.best_tree(levels, len(backbone))
    assert value >= speculative.expected_acceptance(backbone, levels)


def test_expected_acceptance_by_enumeration(random):
    levels = levels_of(random, 3)
    nodes = {(0,), (2,), (0, 1), (0, 1, 2), (2, 2)}
    total = 0.0
    for truth in itertools.product(range(CLASSES), repeat=3):
        chance = math.prod(levels[i, x] for i, x in enumerate(truth))
        total += chance * sum(truth[:length] in nodes for length in (1, 2, 3))
    assert speculative.expected_acceptance(nodes, levels) == pytest.approx(total)


# greedy verification


def one_hot(tokens: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[tokens]


def test_greedy_on_a_chain():
    chain = [-1, 0, 1, 2]
    logits = one_hot([4, 5, 6, 7], 8)
    assert speculative.greedy([0, 4, 5, 6], chain, logits) == ([1, 2, 3], 7)
    assert speculative.greedy([0, 4, 0, 6], chain, logits) == ([1], 5)
    assert speculative.greedy([0, 0, 5, 6], chain, logits) == ([], 4)


def test_greedy_on_a_tree_takes_a_sibling_and_stops_there():
    parents = speculative.backbone_parents(2, 2)
    tokens = [0, 1, 2, 3, 4]
    assert speculative.greedy(tokens, parents, one_hot([2, 5, 6, 0, 0], 7)) == ([2], 6)
    assert speculative.greedy(tokens, parents, one_hot([1, 4, 0, 0, 6], 7)) == ([1, 4], 6)


def test_greedy_emits_what_plain_decoding_would(random, target):
    for _ in range(50):
        parents = [-1, *(int(random.integers(0, n)) for n in range(1, 5))]
        tokens = [0, *random.integers(0, CLASSES, size=4)]
        paths = [speculative.path_to(node, parents) for node in range(len(parents))]
        prefixes = [tuple(int(tokens[n]) for n in path) for path in paths]
        path, following = speculative.greedy(
            tokens, parents, np.stack([target(prefix) for prefix in prefixes])
        )
        plain = ()
        for _ in range(len(path) + 1):
            plain = (*plain, int(np.argmax(target(plain))))
        assert (*(int(tokens[n]) for n in path), following) == plain
        assert plain not in prefixes


# sampling verification


@pytest.mark.parametrize("candidates", [[], [1], [2, 0], [0, 1, 2], [2, 1, 0]])
def test_any_candidate_list_is_lossless(candidates, random):
    probs = softmax(2 * random.normal(size=CLASSES))
    accepted, _ = speculative.candidate_acceptance(candidates, probs)
    assert accepted == pytest.approx(probs[candidates])
    assert speculative.emitted_first(candidates, probs) == pytest.approx(probs)


def test_a_certain_target_is_followed():
    accepted, refused = speculative.candidate_acceptance([1, 0], np.array([1.0, 0.0, 0.0]))
    assert list(accepted) == [0, 1]
    assert list(refused) == [0, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ([0], [-1]),
        ([0, 1, 2, 0], [-1, 0, 1, 2]),
        ([0, 2, 0, 1, 0, 2, 1], [-1, 0, 0, 1, 1, 2, 3]),
        ([0, 0, 2, 1, 2], speculative.backbone_parents(2, 2)),
    ],
)
def test_tree_sampling_is_lossless(tokens, parents, target):
    outcomes = speculative.tree_outcomes(tokens, parents, target)
    assert sum(outcomes.values()) == pytest.approx(1)
    for length in (1, 2, 4):
        assert completed(outcomes, target, length) == pytest.approx(joint(target, length))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chain_sampling_is_lossless(depth, random, target):
    outcomes = speculative.chain_outcomes(levels_of(random, depth), target)
    assert sum(outcomes.values()) == pytest.approx(1)
    for length in (1, depth + 1):
        assert completed(outcomes, target, length) == pytest.approx(joint(target, length))


def test_chain_accepts_the_overlap(random, target):
    levels = levels_of(random, 1)
    outcomes = speculative.chain_outcomes(levels, target)
    accepted = sum(chance for emitted, chance in outcomes.items() if len(emitted) == 2)
    assert accepted == pytest.approx(np.minimum(levels[0], target(())).sum())
    always = speculative.chain_outcomes(target(())[None], target)
    assert {len(emitted) for emitted in always} == {2}


def test_a_residual_left_whole_is_not_lossless(random):
    """What the enumeration would say of a verifier that forgets to take the draft away."""
    draft, probs = softmax(random.normal(size=CLASSES)), softmax(random.normal(size=CLASSES))
    overlap = np.minimum(draft, probs)
    refused = 1 - overlap.sum()
    assert overlap + refused * speculative.chain_residual(draft, probs) == pytest.approx(probs)
    assert np.abs(overlap + refused * probs - probs).max() > 0.01


def test_typical_acceptance():
    # Entropies of 0.94 and 0.91 would give 0.12: the threshold is epsilon.
    assert list(speculative.typical_acceptance(np.array([0.5, 0.40, 0.10]))) == [True] * 3
    assert list(speculative.typical_acceptance(np.array([0.5, 0.42, 0.08]))) == [True, True, False]
    # With a delta of 9 the threshold is epsilon, and equal to it is not above it.
    assert speculative.typical_acceptance(np.full(3, 1 / 3), delta=9.0).all()
    assert not speculative.typical_acceptance(np.full(4, 0.25), epsilon=0.25, delta=9.0).any()
    assert list(speculative.typical_acceptance(np.array([1.0, 0.0]))) == [True, False]
    sure, flat = np.array([0.97, 0.02, 0.01]), np.full(20, 0.05)
    assert list(speculative.typical_acceptance(sure)) == [True, False, False]
    assert speculative.typical_acceptance(flat).all()  # above 0.015, by its entropy
    assert list(speculative.typical_acceptance(sure, delta=9.0)) == [True, False, False]
    assert not speculative.typical_acceptance(np.full(4, 0.25), epsilon=0.3, delta=9.0).any()


# acceptance length


def test_tau_agrees_with_the_measured_rounds(random):
    rounds, depth, k, classes = 300, 4, 3, 6
    truth = random.integers(0, classes, size=(rounds, depth))
    candidates = np.stack(
        [[random.permutation(classes)[:k] for _ in range(depth)] for _ in range(rounds)]
    )
    candidates[:, :, 0] = np.where(random.random((rounds, depth)) < 0.6, truth, -1)
    measured = [speculative.backbone_round(c, t) for c, t in zip(candidates, truth, strict=True)]
    assert speculative.tau(*speculative.backbone_rates(candidates, truth)) == pytest.approx(
        np.mean(measured)
    )


def test_backbone_round_is_greedy_verification_of_the_backbone_tree(random):
    depth, k, classes = 3, 2, 4
    parents = speculative.backbone_parents(depth, k)
    for _ in range(50):
        candidates = np.stack([random.permutation(classes)[:k] for _ in range(depth)])
        truth = random.integers(0, classes, size=depth + 1)
        tokens = [0, *candidates.ravel()]
        logits = one_hot([truth[d] for d in speculative.depths(parents)], classes)
        path, _ = speculative.greedy(tokens, parents, logits)
        assert speculative.backbone_round(candidates, truth[:depth]) == len(path) + 1


def test_tau_of_an_oracle_and_of_a_drafter_that_is_never_right():
    truth = np.array([[1, 2, 3], [3, 2, 1]])
    oracle = np.stack([truth, np.zeros_like(truth)], axis=2)
    assert speculative.tau(*speculative.backbone_rates(oracle, truth)) == 4
    assert speculative.tau(*speculative.backbone_rates(np.zeros_like(oracle), truth)) == 1
