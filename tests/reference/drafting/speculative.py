"""Verification of drafted tokens, trees of them, and the acceptance length.

A tree is given by `parents`, one for each node: node 0 is the root, the last committed token,
with parent -1; a parent comes before its children. A target is a function from the tokens after
the root to the next token's probabilities [V]. A drafter that does not see its own tokens is
one distribution per depth: levels [D, V].
"""

import math
from collections.abc import Callable

import numpy as np

Target = Callable[[tuple[int, ...]], np.ndarray]
Outcomes = dict[tuple[int, ...], float]


def path_to(node: int, parents: list[int]) -> list[int]:
    """The nodes from the first after the root to this one; [] for the root."""
    return [] if node == 0 else [*path_to(parents[node], parents), node]


def depths(parents: list[int]) -> list[int]:
    """Edges from the root, for each node."""
    return [len(path_to(node, parents)) for node in range(len(parents))]


def ancestor_mask(parents: list[int]) -> np.ndarray:
    """Attention within the tree [N, N] bool: row n sees itself, its ancestors and the root."""
    sees = np.zeros((len(parents), len(parents)), dtype=bool)
    for node in range(len(parents)):
        sees[node, [0, *path_to(node, parents)]] = True
    return sees


def leaf_paths(parents: list[int]) -> list[list[int]]:
    """path_to of every node that is no parent."""
    return [path_to(n, parents) for n in range(len(parents)) if n not in parents]


def backbone_parents(depth: int, k: int) -> list[int]:
    """The backbone tree: k candidates at each level i = 1..depth, of which only the first is
    expanded. id(i, r) = 1 + (i - 1) k + r;  parent 0 if i = 1, else 1 + (i - 2) k."""
    parents = [-1] * (1 + depth * k)
    for i in range(1, depth + 1):
        for r in range(k):
            parents[1 + (i - 1) * k + r] = 0 if i == 1 else 1 + (i - 2) * k
    return parents


def greedy(
    tokens: list[int], parents: list[int], target_logits: np.ndarray
) -> tuple[list[int], int]:
    """The longest path whose tokens equal the target's argmax at each parent, and the target's
    argmax after it. target_logits [N, V]: row n is what follows node n; tokens[0] is not read.
    """
    best = [int(np.argmax(row)) for row in target_logits]
    accepted = [
        path
        for path in (path_to(node, parents) for node in range(len(parents)))
        if all(tokens[node] == best[parents[node]] for node in path)
    ]
    longest = max(accepted, key=len)
    return longest, best[longest[-1] if longest else 0]


def candidate_acceptance(candidates: list[int], probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct candidates tried in order against the target's probs [V]: accept x with
    probability p(x); on refusal set p(x) = 0 and renormalise.

    Returns the probability that each candidate is the accepted one [len(candidates)], and the
    probability that all are refused and v is then drawn from what is left [V].
    """
    left, reached = np.array(probs, dtype=np.float64), 1.0
    accepted = np.zeros(len(candidates))
    for j, token in enumerate(candidates):
        accepted[j] = reached * left[token]
        reached *= 1 - left[token]
        left[token] = 0.0
        if left.sum() > 0:
            left = left / left.sum()
    return accepted, reached * left


def emitted_first(candidates: list[int], probs: np.ndarray) -> np.ndarray:
    """The exact distribution [V] of the first token emitted for these candidates."""
    accepted, emitted = candidate_acceptance(candidates, probs)
    for token, chance in zip(candidates, accepted, strict=True):
        emitted[token] += chance
    return emitted


def tree_outcomes(tokens: list[int], parents: list[int], target: Target) -> Outcomes:
    """The exact distribution of what one round emits, accepted tokens and the one after them,
    when each node's children are tried in the order of their ids."""
    outcomes: Outcomes = {}

    def visit(node: int, emitted: tuple[int, ...], reached: float) -> None:
        children = [n for n in range(1, len(parents)) if parents[n] == node]
        accepted, afterwards = candidate_acceptance([tokens[n] for n in children], target(emitted))
        for child, chance in zip(children, accepted, strict=True):
            visit(child, (*emitted, tokens[child]), reached * chance)
        for token, chance in enumerate(afterwards):
            if chance > 0:
                sequence = (*emitted, token)
                outcomes[sequence] = outcomes.get(sequence, 0.0) + reached * chance

    visit(0, (), 1.0)
    return outcomes


def chain_residual(draft: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """What a refused draft is replaced from: (probs - draft)+ renormalised, [V]. The two must
    differ: equal ones refuse nothing."""
    positive = np.maximum(probs - draft, 0)
    return positive / positive.sum()


def chain_outcomes(levels: np.ndarray, target: Target) -> Outcomes:
    """The exact distribution of what one round emits for a chain sampled from levels [D, V]:
    token x accepted with min(1, target(x) / draft(x)), the rest drawn from chain_residual."""
    outcomes: Outcomes = {}

    def visit(depth: int, emitted: tuple[int, ...], reached: float) -> None:
        probs = target(emitted)
        ending = reached * probs
        if depth < len(levels):
            draft, refused = levels[depth], 0.0
            for token in np.flatnonzero(draft):
                accept = min(1.0, probs[token] / draft[token])
                refused += draft[token] * (1 - accept)
                visit(depth + 1, (*emitted, int(token)), reached * draft[token] * accept)
            if not (probs > draft).any():
                return
            ending = reached * refused * chain_residual(draft, probs)
        for token, chance in enumerate(ending):
            if chance > 0:
                sequence = (*emitted, token)
                outcomes[sequence] = outcomes.get(sequence, 0.0) + chance

    visit(0, (), 1.0)
    return outcomes


def typical_acceptance(probs: np.ndarray, epsilon: float = 0.09, delta: float = 0.3) -> np.ndarray:
    """Accepted [V] bool: p(x) > min(epsilon, delta exp(-H(p))). Not lossless."""
    entropy = -math.fsum(p * math.log(p) for p in probs if p > 0)
    return probs > min(epsilon, delta * math.exp(-entropy))


def expected_acceptance(nodes: set[tuple[int, ...]], levels: np.ndarray) -> float:
    """The expected number of accepted tokens if the target drew each depth from levels [D, V].

    A node is the tokens on its path. The node is accepted if all of them are right, so each
    adds the product of their probabilities.
    """
    return math.fsum(math.prod(levels[i][x] for i, x in enumerate(node)) for node in nodes)


def best_tree(levels: np.ndarray, budget: int) -> tuple[set[tuple[int, ...]], float]:
    """Of all trees of `budget` nodes without the root, one of highest expected acceptance, and
    that expectation. Every tree is tried, so keep budget, depth and classes small."""
    depth, classes = levels.shape
    trees: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(budget):
        trees = {
            tree | {(*parent, token)}
            for tree in trees
            for parent in [(), *tree]
            for token in range(classes)
            if len(parent) < depth and (*parent, token) not in tree
        }
    best = max(trees, key=lambda tree: expected_acceptance(set(tree), levels))
    return set(best), expected_acceptance(set(best), levels)


def tau(backbone_right: list[float], recall: list[float]) -> float:
    """Tokens emitted per round of greedy verification of a backbone tree, the bonus counted.

    tau = 1 + sum_i (prod_{j<i} a_j) b_i: a_i the rate at which the backbone's token at level i
    is right, b_i the rate at which some candidate of the level is, both given the backbone right
    at every level before.
    """
    total, reached = 1.0, 1.0
    for a, b in zip(backbone_right, recall, strict=True):
        total += reached * b
        reached *= a
    return total


def backbone_round(candidates: np.ndarray, truth: np.ndarray) -> int:
    """Tokens emitted by one greedy round: candidates [D, k], the backbone's first, and the
    target's own continuation [D]."""
    emitted = 1
    for level, token in zip(candidates, truth, strict=True):
        if token not in level:
            break
        emitted += 1
        if token != level[0]:
            break
    return emitted


def backbone_rates(candidates: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[float]]:
    """(a, b) of `tau` as measured over R rounds: candidates [R, D, k], truth [R, D]. A level that
    no round reached has rates 0."""
    a, b = [], []
    reached = list(range(len(truth)))
    for i in range(truth.shape[1]):
        right = [r for r in reached if truth[r, i] == candidates[r, i, 0]]
        found = [r for r in reached if truth[r, i] in candidates[r, i]]
        a.append(len(right) / len(reached) if reached else 0.0)
        b.append(len(found) / len(reached) if reached else 0.0)
        reached = right
    return a, b
