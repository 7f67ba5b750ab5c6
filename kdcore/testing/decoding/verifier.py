"""The conformance suite of verifiers, with a target whose next token depends on the last only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import DraftTree, Verdict, chain, is_chain, shape_of
from kdcore.errors import UserError
from kdcore.method.records import LOG_ZERO
from kdcore.testing.decoding.draft_trees import p_value
from kdcore.testing.suite import Suite, same, same_global_random

CLASSES = 4
ROOT = 1
"""The last committed token of every row."""
DEPTH = 2
DRAWS = 40_000
"""Number of rows in one pass; each emits the first 1 + DEPTH tokens after the root."""
LEAST = 1e-6
"""Minimum p-value of a fit; the draws are seeded, so the result is deterministic."""


class MarkovTarget:
    """A target whose log-probs depend on the last token only, by a table of transitions.

    The last class is excluded after the root.

    Args:
        tree: The draft tree.
        certain: Whether each token has a single possible successor.
    """

    def __init__(self, tree: DraftTree, certain: bool = False) -> None:
        random = torch.Generator().manual_seed(2)
        logits = 1.5 * torch.randn(CLASSES, CLASSES, generator=random)
        logits[ROOT, -1] = LOG_ZERO
        self.table = logits.log_softmax(-1).clamp(min=LOG_ZERO)
        if certain:
            best = logits.argmax(-1, keepdim=True)
            self.table = torch.full_like(logits, LOG_ZERO).scatter(1, best, 0.0)
        root = torch.full((len(tree.tokens), 1), ROOT)
        self.last = torch.cat([root, tree.tokens.clamp(min=0)], dim=1)

    def __call__(self, slots: Tensor) -> Tensor:
        """Return the log-probs [B, M, V] after slots [B, M] of the tree."""
        rows, count = self.last.shape
        assert slots.shape[0] == rows and slots.ndim == 2, f"slots are {tuple(slots.shape)}"
        assert ((slots >= 0) & (slots < count)).all(), f"a slot is outside 0 to {count - 1}"
        return self.table[self.last.gather(1, slots)]


class VerifierSuite(Suite):
    """The checks of a `Verifier`.

    Every verifier must return verdicts that a session can apply. A ``greedy`` one must emit the
    target's likeliest tokens, and a ``lossless`` one must also keep the target's distribution. A
    ``chain`` verifier must refuse branching trees by a UserError, and is checked with chains.
    """

    kind = "verifier"

    def test_it_says_whether_it_is_lossless(self) -> None:
        """The bench shows ``lossless``, and the loop refuses to sample with a ``greedy`` one."""
        verifier = self.component()
        assert isinstance(verifier.lossless, bool), f"lossless is {verifier.lossless!r}"
        greedy = getattr(verifier, "greedy", False)
        assert isinstance(greedy, bool), f"greedy is {greedy!r}"

    def test_it_says_whether_it_follows_a_single_chain(self) -> None:
        """A run refuses a ``chain`` verifier with a branching tree before it decodes."""
        says = getattr(self.component(), "chain", False)
        assert isinstance(says, bool), f"chain is {says!r}"
        tree = branching(3)
        takes = self.verdict(tree, MarkovTarget(tree)) is not None
        verb = "accepts" if takes else "refuses"
        assert takes != says, f"chain is {says}, but the verifier {verb} a branching tree"

    def test_a_verdict_is_a_path_and_a_token_that_may_follow(self) -> None:
        """A path goes from the root down, with -1 after its end; the target allows the token."""
        for tree in (branching(64), random_chains(64), sampled_chains(64)):
            for certain in (True, False):
                target = MarkovTarget(tree, certain)
                verdict = self.verdict(tree, target)
                if verdict is not None:
                    assert_valid(verdict, tree, target)

    def test_padding_is_never_kept(self) -> None:
        """The row did not propose padding, however likely its token is."""
        tree = likely_chain(6)
        kept = torch.tensor([0, 0, 1, 1, 2, 2])
        tree = replace(tree, mask=torch.arange(DEPTH) < kept[:, None])
        verdict = self.component()(tree, MarkovTarget(tree, certain=True), generator())
        assert (verdict.accepted <= kept).all(), f"rows of {kept.tolist()} nodes: {verdict.path}"

    def test_a_tree_without_nodes_gives_the_targets_own_token(self) -> None:
        """Without drafts, decoding equals plain decoding."""
        tree = first(random_chains(64), 0)
        target = MarkovTarget(tree, certain=True)
        verdict = self.component()(tree, target, generator())
        assert not verdict.accepted.any(), f"an empty tree gives the path {verdict.path.tolist()}"
        same(verdict.token, target.table[ROOT].argmax(-1).expand(64), "not the target's token")

    def test_it_keeps_what_the_target_would_say(self) -> None:
        """A chain of the only possible tokens is accepted in full."""
        tree = likely_chain(3)
        verdict = self.component()(tree, MarkovTarget(tree, certain=True), generator())
        assert (verdict.accepted == DEPTH).all(), f"a certain chain is rejected: {verdict.path}"

    def test_rows_do_not_see_each_other(self) -> None:
        """With a certain target, a row gets the same verdict in a batch as alone."""
        for tree in (branching(12), random_chains(12)):
            together = self.verdict(tree, MarkovTarget(tree, certain=True))
            for row in range(len(tree.tokens)):
                one = replace(tree, tokens=tree.tokens[row, None], mask=tree.mask[row, None])
                alone = self.verdict(one, MarkovTarget(one, certain=True))
                if together is not None and alone is not None:
                    left, right = _emitted(together, tree)[row], _emitted(alone, one)[0]
                    assert left == right, f"row {row} emits {left}, but alone {right}"

    def test_without_chance_it_emits_the_likeliest_tokens(self) -> None:
        """At temperature 0 a lossless verifier emits the likeliest tokens only."""
        if not self.component().lossless:
            return
        for tree in (branching(64), random_chains(64), sampled_chains(64)):
            target = MarkovTarget(tree, certain=True)
            verdict = self.verdict(tree, target)
            for emitted in _emitted(verdict, tree) if verdict is not None else ():
                expected, last = [], ROOT
                for _ in emitted:
                    last = int(target.table[last].argmax())
                    expected.append(last)
                assert emitted == expected, f"emits {emitted}, but the target emits {expected}"

    def test_fixed_candidates_leave_the_targets_distribution(self) -> None:
        """A chi-square test of the first emitted tokens, for a lossless verifier that samples."""
        for tree in (branching(DRAWS), random_chains(DRAWS)):
            self.assert_lossless(tree)

    def test_sampled_candidates_leave_the_targets_distribution(self) -> None:
        """The same test for chains that were sampled from a draft distribution."""
        self.assert_lossless(sampled_chains(DRAWS))

    def test_randomness_comes_from_the_generator_alone(self) -> None:
        """The same seed gives the same verdict, whatever the state of the global generators."""
        tokens = []
        for seed in (1, 2):
            tree = sampled_chains(256)
            with same_global_random(seed):
                tokens.append(self.component()(tree, MarkovTarget(tree), generator()).token)
        same(tokens[0], tokens[1], "the verifier uses another generator")

    def test_without_a_generator_it_draws_from_torchs_own(self) -> None:
        """``generate`` of transformers does not pass a generator."""
        tree = sampled_chains(64)
        with same_global_random():
            verdict = self.component()(tree, MarkovTarget(tree), None)
        assert verdict.token.shape == (64,), f"the tokens are {tuple(verdict.token.shape)}"

    def test_the_tree_is_left_alone(self) -> None:
        """It does not change the tree, which the session still reads."""
        tree, untouched = sampled_chains(64), sampled_chains(64)
        self.component()(tree, MarkovTarget(tree), generator())
        same(tree.tokens, untouched.tokens, "the verifier changed the tokens")
        same(tree.mask, untouched.mask, "the verifier changed the mask")
        assert tree.logp is not None and untouched.logp is not None
        same(tree.logp, untouched.logp, "the verifier changed the log-probs")

    def verdict(self, tree: DraftTree, target: MarkovTarget) -> Verdict | None:
        """Return the verdict of a new component; None if it refuses a branching tree."""
        try:
            own = replace(tree, tokens=tree.tokens.clone(), mask=tree.mask.clone())
            verdict: Verdict = self.component()(own, target, generator())
        except UserError:
            assert not is_chain(tree.shape), "the verifier refuses a chain"
            return None
        return verdict

    def assert_lossless(self, tree: DraftTree) -> None:
        """Assert that the first 1 + DEPTH emitted tokens follow the target's distribution.

        A row that emitted fewer continues with tokens of the target, as its next round would.
        """
        verifier, target = self.component(), MarkovTarget(tree)
        if not verifier.lossless or getattr(verifier, "greedy", False):
            return
        verdict = self.verdict(tree, target)
        if verdict is None:
            return
        assert_valid(verdict, tree, target)
        random, probs = torch.Generator().manual_seed(6), target.table.exp()
        tokens = tree.tokens.gather(1, verdict.path.clamp(min=0))
        last, outcome = torch.full_like(verdict.token, ROOT), torch.zeros_like(verdict.token)
        for place in range(1 + DEPTH):
            token = torch.where(verdict.accepted == place, verdict.token, draw(probs[last], random))
            if place < tokens.shape[1]:
                token = torch.where(verdict.accepted > place, tokens[:, place], token)
            outcome, last = outcome * CLASSES + token, token
        chances = probs[ROOT].double()
        for _ in range(DEPTH):
            chances = (chances[:, None] * probs.double().repeat(len(chances) // CLASSES, 1)).ravel()
        counts = torch.bincount(outcome, minlength=len(chances))
        fit = p_value(dict(enumerate(counts.tolist())), dict(enumerate(chances.tolist())))
        assert fit > LEAST, f"{DRAWS} draws do not fit the target's distribution: p = {fit:.2g}"

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Verify the step's chains."""
        tree = sampled_chains(64, seed=step)
        with same_global_random():
            verdict = component(tree, MarkovTarget(tree), generator())
        return [verdict.path, verdict.token]


def assert_valid(verdict: Verdict, tree: DraftTree, target: MarkovTarget) -> None:
    """Assert that a session can apply a verdict."""
    rows, nodes = tree.tokens.shape
    path, token = verdict.path, verdict.token
    assert path.dtype == token.dtype == torch.int64, f"path {path.dtype}, token {token.dtype}"
    assert path.ndim == 2 and len(path) == rows, f"the path is {tuple(path.shape)}, not [B, D]"
    assert token.shape == (rows,), f"the token is {tuple(token.shape)}, not [B]"
    assert ((path >= -1) & (path < nodes)).all(), f"a node of the path is outside 0 to {nodes - 1}"
    parents = tree.shape.parents.expand(rows, -1)
    above = torch.full((rows,), -1)
    for place, node in enumerate(path.unbind(1)):
        kept, index = node >= 0, node.clamp(min=0)[:, None]
        assert not (kept & (above < -1)).any(), "the path continues after a -1"
        follows = parents.gather(1, index).squeeze(1) == above
        assert (follows | ~kept).all(), f"node {place} of the path is not a child of the previous"
        assert (tree.mask.gather(1, index).squeeze(1) | ~kept).all(), "the path contains padding"
        above = torch.where(kept, node, -2)
    end = path.amax(1, keepdim=True) + 1 if path.shape[1] else torch.zeros(rows, 1).long()
    chance = target(end).squeeze(1).gather(1, token[:, None])
    assert (chance > LOG_ZERO / 2).all(), "the verifier emits a token that the target excludes"


def generator() -> torch.Generator:
    """Return a generator that is seeded equally at each call."""
    return torch.Generator().manual_seed(5)


def branching(rows: int) -> DraftTree:
    """Make trees of three candidates after the root, one excluded, and two after the first."""
    tokens = torch.tensor([2, 0, 3, 1, 3]).expand(rows, -1)
    shape = shape_of(torch.tensor([[-1, -1, -1, 0, 0]]))
    return DraftTree(tokens, shape, torch.ones_like(tokens, dtype=torch.bool))


def random_chains(rows: int) -> DraftTree:
    """Make fixed chains of random tokens, independent of the target."""
    random = torch.Generator().manual_seed(7)
    tokens = torch.randint(CLASSES, (rows, DEPTH), generator=random)
    return DraftTree(tokens, chain(DEPTH, tokens.device), torch.ones_like(tokens).bool())


def likely_chain(rows: int) -> DraftTree:
    """Make chains of the target's likeliest tokens."""
    tree = random_chains(rows)
    table = MarkovTarget(tree, certain=True).table
    tokens, last = torch.zeros_like(tree.tokens), torch.full((rows,), ROOT)
    for depth in range(DEPTH):
        tokens[:, depth] = last = table[last].argmax(-1)
    return replace(tree, tokens=tokens)


def sampled_chains(rows: int, seed: int = 8) -> DraftTree:
    """Sample chains from a draft distribution that differs from the target's."""
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(9))
    table = table.log_softmax(-1)
    last, tokens, logp = torch.full((rows,), ROOT), [], []
    for _ in range(DEPTH):
        logp.append(table[last])
        last = draw(table[last].exp(), random)
        tokens.append(last)
    drafted = torch.stack(tokens, dim=1)
    mask = torch.ones_like(drafted, dtype=torch.bool)
    return DraftTree(drafted, chain(DEPTH, drafted.device), mask, torch.stack(logp, dim=1))


def first(tree: DraftTree, nodes: int) -> DraftTree:
    """Truncate chains to their first ``nodes`` nodes."""
    return DraftTree(tree.tokens[:, :nodes], chain(nodes, tree.tokens.device), tree.mask[:, :nodes])


def _emitted(verdict: Verdict, tree: DraftTree) -> list[list[int]]:
    """The emitted tokens of each row: the path and the bonus."""
    rows = []
    for row, (path, token) in enumerate(
        zip(verdict.path.tolist(), verdict.token.tolist(), strict=True)
    ):
        rows.append([int(tree.tokens[row, node]) for node in path if node >= 0] + [token])
    return rows
