"""What a verifier must hold, asked about a target whose next token depends on the last alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import chain, is_chain, shape_of
from kdcore.errors import UserError
from kdcore.method.records import LOG_ZERO, DraftTree, Verdict
from kdcore.testing.draft_trees import p_value
from kdcore.testing.suite import Suite, same, same_global_random

CLASSES = 4
ROOT = 1
"""The token that every row ends with."""
DEPTH = 2
DRAWS = 40_000
"""Rows of one pass; each emits the first 1 + DEPTH tokens after the root."""
LEAST = 1e-6
"""The p-value below which a fit is called bad: the draws are seeded, and so is the verdict."""


class MarkovTarget:
    """Log-probs [B, M, V] after slots [B, M] of a tree: a row of a table for the token there.

    Every class may follow some token, and no class every one: the last is excluded after the root.
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
        """Asked for slots that there are, each row its own."""
        rows, count = self.last.shape
        assert slots.shape[0] == rows and slots.ndim == 2, f"slots are {tuple(slots.shape)}"
        assert ((slots >= 0) & (slots < count)).all(), f"asked for a slot of {count} there is not"
        return self.table[self.last.gather(1, slots)]


class VerifierSuite(Suite):
    """The checks of a `Verifier`.

    One that says ``greedy`` is held to the target's likeliest tokens, one that says ``lossless``
    to its distribution also, and any to give verdicts that a session can carry out. One that
    says ``chain`` refuses trees that branch with a UserError, and is tried with chains.
    """

    kind = "verifier"

    def test_it_says_whether_it_is_lossless(self) -> None:
        """The bench shows it beside the speed, and the loop refuses to sample with a greedy one."""
        verifier = self.component()
        assert isinstance(verifier.lossless, bool), f"lossless is {verifier.lossless!r}"
        greedy = getattr(verifier, "greedy", False)
        assert isinstance(greedy, bool), f"greedy is {greedy!r}"

    def test_it_says_whether_it_follows_a_single_chain(self) -> None:
        """Then it is refused with a tree that branches before anything is decoded."""
        says = getattr(self.component(), "chain", False)
        assert isinstance(says, bool), f"chain is {says!r}"
        tree = branching(3)
        takes = self.verdict(tree, MarkovTarget(tree)) is not None
        assert takes != says, f"chain is {says}, and {takes} that it takes a tree that branches"

    def test_a_verdict_is_a_path_and_a_token_that_may_follow(self) -> None:
        """Nodes from the root down, -1 behind the last; a token the target gives a chance."""
        for tree in (branching(64), random_chains(64), sampled_chains(64)):
            for certain in (True, False):
                target = MarkovTarget(tree, certain)
                verdict = self.verdict(tree, target)
                if verdict is not None:
                    assert_valid(verdict, tree, target)

    def test_padding_is_never_kept(self) -> None:
        """However likely its token: the row did not propose it."""
        tree = likely_chain(6)
        kept = torch.tensor([0, 0, 1, 1, 2, 2])
        tree = replace(tree, mask=torch.arange(DEPTH) < kept[:, None])
        verdict = self.component()(tree, MarkovTarget(tree, certain=True), generator())
        assert (verdict.accepted <= kept).all(), f"{kept.tolist()} nodes, path {verdict.path}"

    def test_a_tree_without_nodes_gives_the_targets_own_token(self) -> None:
        """So a drafter that drafts nothing decodes plainly."""
        tree = first(random_chains(64), 0)
        target = MarkovTarget(tree, certain=True)
        verdict = self.component()(tree, target, generator())
        assert not verdict.accepted.any(), f"path {verdict.path.tolist()} of no nodes"
        same(verdict.token, target.table[ROOT].argmax(-1).expand(64), "not the target's token")

    def test_it_keeps_what_the_target_would_say(self) -> None:
        """A chain of the target's only tokens is kept whole."""
        tree = likely_chain(3)
        verdict = self.component()(tree, MarkovTarget(tree, certain=True), generator())
        assert (verdict.accepted == DEPTH).all(), f"a certain chain is refused: {verdict.path}"

    def test_rows_do_not_see_each_other(self) -> None:
        """Where nothing is left to chance, a row's verdict is the one it gets alone."""
        for tree in (branching(12), random_chains(12)):
            together = self.verdict(tree, MarkovTarget(tree, certain=True))
            for row in range(len(tree.tokens)):
                one = replace(tree, tokens=tree.tokens[row, None], mask=tree.mask[row, None])
                alone = self.verdict(one, MarkovTarget(one, certain=True))
                if together is not None and alone is not None:
                    left, right = _emitted(together, tree)[row], _emitted(alone, one)[0]
                    assert left == right, f"row {row} emits {left}, and alone {right}"

    def test_without_chance_it_emits_the_likeliest_tokens(self) -> None:
        """Of a lossless one: at temperature 0 nothing else has a probability."""
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
                assert emitted == expected, f"emits {emitted}, and the target says {expected}"

    def test_fixed_candidates_leave_the_targets_distribution(self) -> None:
        """Of a lossless one that samples: a chi-square test of the first tokens emitted."""
        for tree in (branching(DRAWS), random_chains(DRAWS)):
            self.assert_lossless(tree)

    def test_sampled_candidates_leave_the_targets_distribution(self) -> None:
        """The same where each row's chain was drawn from a draft distribution of its own."""
        self.assert_lossless(sampled_chains(DRAWS))

    def test_randomness_comes_from_the_generator_alone(self) -> None:
        """The same seed gives the same verdict, whatever the global generators stand at."""
        tokens = []
        for seed in (1, 2):
            tree = sampled_chains(256)
            with same_global_random(seed):
                tokens.append(self.component()(tree, MarkovTarget(tree), generator()).token)
        same(tokens[0], tokens[1], "drawn from somewhere else than the generator")

    def test_without_a_generator_it_draws_from_torchs_own(self) -> None:
        """Plain transformers' generate has none to give."""
        tree = sampled_chains(64)
        with same_global_random():
            verdict = self.component()(tree, MarkovTarget(tree), None)
        assert verdict.token.shape == (64,), f"the tokens are {tuple(verdict.token.shape)}"

    def test_the_tree_is_left_alone(self) -> None:
        """The session still reads it."""
        tree, untouched = sampled_chains(64), sampled_chains(64)
        self.component()(tree, MarkovTarget(tree), generator())
        same(tree.tokens, untouched.tokens, "the verifier wrote into the tokens")
        same(tree.mask, untouched.mask, "the verifier wrote into the mask")
        assert tree.logp is not None and untouched.logp is not None
        same(tree.logp, untouched.logp, "the verifier wrote into the log-probs")

    def verdict(self, tree: DraftTree, target: MarkovTarget) -> Verdict | None:
        """The verdict of a new component; None where it refuses a tree because it branches."""
        try:
            own = replace(tree, tokens=tree.tokens.clone(), mask=tree.mask.clone())
            verdict: Verdict = self.component()(own, target, generator())
        except UserError:
            assert not is_chain(tree.shape), "it refuses a chain"
            return None
        return verdict

    def assert_lossless(self, tree: DraftTree) -> None:
        """Assert that the first 1 + DEPTH tokens emitted follow the target's distribution.

        A row that emitted fewer goes on as its next round would: with the target's own tokens.
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
        """The verdict on the chains of that step."""
        tree = sampled_chains(64, seed=step)
        with same_global_random():
            verdict = component(tree, MarkovTarget(tree), generator())
        return [verdict.path, verdict.token]


def assert_valid(verdict: Verdict, tree: DraftTree, target: MarkovTarget) -> None:
    """Assert that a session can carry a verdict out."""
    rows, nodes = tree.tokens.shape
    path, token = verdict.path, verdict.token
    assert path.dtype == token.dtype == torch.int64, f"path {path.dtype}, token {token.dtype}"
    assert path.ndim == 2 and len(path) == rows, f"the path is {tuple(path.shape)}, not [B, D]"
    assert token.shape == (rows,), f"the token is {tuple(token.shape)}, not [B]"
    assert ((path >= -1) & (path < nodes)).all(), f"the path names a node of {nodes} there is not"
    parents = tree.shape.parents.expand(rows, -1)
    above = torch.full((rows,), -1)
    for place, node in enumerate(path.unbind(1)):
        kept, index = node >= 0, node.clamp(min=0)[:, None]
        assert not (kept & (above < -1)).any(), "the path goes on behind a -1"
        follows = parents.gather(1, index).squeeze(1) == above
        assert (follows | ~kept).all(), f"node {place} of the path is no child of the one before"
        assert (tree.mask.gather(1, index).squeeze(1) | ~kept).all(), "the path holds padding"
        above = torch.where(kept, node, -2)
    end = path.amax(1, keepdim=True) + 1 if path.shape[1] else torch.zeros(rows, 1).long()
    chance = target(end).squeeze(1).gather(1, token[:, None])
    assert (chance > LOG_ZERO / 2).all(), "a token is emitted that the target excludes there"


def generator() -> torch.Generator:
    """The same random numbers at each call."""
    return torch.Generator().manual_seed(5)


def branching(rows: int) -> DraftTree:
    """Three candidates after the root, one of them excluded, and two after the first of them."""
    tokens = torch.tensor([2, 0, 3, 1, 3]).expand(rows, -1)
    shape = shape_of(torch.tensor([[-1, -1, -1, 0, 0]]))
    return DraftTree(tokens, shape, torch.ones_like(tokens, dtype=torch.bool))


def random_chains(rows: int) -> DraftTree:
    """Fixed chains; which tokens they hold has nothing to do with the target."""
    random = torch.Generator().manual_seed(7)
    tokens = torch.randint(CLASSES, (rows, DEPTH), generator=random)
    return DraftTree(tokens, chain(DEPTH, tokens.device), torch.ones_like(tokens).bool())


def likely_chain(rows: int) -> DraftTree:
    """The target's likeliest tokens."""
    tree = random_chains(rows)
    table = MarkovTarget(tree, certain=True).table
    tokens, last = torch.zeros_like(tree.tokens), torch.full((rows,), ROOT)
    for depth in range(DEPTH):
        tokens[:, depth] = last = table[last].argmax(-1)
    return replace(tree, tokens=tokens)


def sampled_chains(rows: int, seed: int = 8) -> DraftTree:
    """Chains that a drafter of its own mind sampled, each token from a row of its table."""
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
    """A chain cut short."""
    return DraftTree(tree.tokens[:, :nodes], chain(nodes, tree.tokens.device), tree.mask[:, :nodes])


def _emitted(verdict: Verdict, tree: DraftTree) -> list[list[int]]:
    """Each row's path and bonus."""
    rows = []
    for row, (path, token) in enumerate(
        zip(verdict.path.tolist(), verdict.token.tolist(), strict=True)
    ):
        rows.append([int(tree.tokens[row, node]) for node in path if node >= 0] + [token])
    return rows
