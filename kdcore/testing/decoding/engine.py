"""The conformance suite of engines, bound to a tiny Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.engines.protocols import CompilingEngine
from kdcore.decoding.layers.attention import TreeAttention
from kdcore.decoding.session import SPARE, Session
from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.errors import UserError
from kdcore.testing.decoding import tiny_target
from kdcore.testing.decoding.compiled_passes import AttentionPass, EagerPass
from kdcore.testing.decoding.tiny_target import CLASSES, PROMPTS
from kdcore.testing.suite import Suite, same

LAYERS = (3, 1)
"""Hidden states that the engine returns: that of the last layer, which the final norm changes, and
another one, in an order that is not increasing."""
PARENTS = (-1, -1, 0, 0, 2)
PATHS = ((), (1,), (0, 3), (0, 2, 4))
"""Paths of this tree, from the root down."""


class EngineSuite(Suite):
    """The checks of an `Engine`.

    A subclass may set the tolerance, for an engine that rounds otherwise than float32.

    Attributes:
        tolerance: Maximum difference of logits and features from the target's, relative to the
            largest.
    """

    kind = "engine"
    tolerance = 1e-4

    def bound(self, layers: tuple[int, ...] = LAYERS) -> Any:
        """Build a new engine and bind it to a new target."""
        engine = self.component()
        engine.bind(tiny_target.target(), layers)
        return engine

    def session(self) -> Session:
        """Return a session of a new target with a new engine, with the prompts read."""
        target = tiny_target.target()
        engine = self.component()
        engine.bind(target, LAYERS)
        session = Session(target, LAYERS, engine)
        session.start(len(PROMPTS))
        session.extend(*_padded())
        return session

    def test_a_tree_has_the_logits_and_features_of_its_paths(self) -> None:
        """Each node sees its ancestors and its row alone, at its position."""
        session = self.session()
        self._scores_like_the_target(session, [list(prompt) for prompt in PROMPTS])

    def test_what_was_kept_stays_and_the_rest_is_hidden(self) -> None:
        """Passes go on from different paths, before and after the cache is compacted."""
        session, rows = self.session(), [list(prompt) for prompt in PROMPTS]
        for number in range(2 * SPARE // (1 + len(PARENTS))):
            root, tree = _tree(number)
            with torch.inference_mode(), session.serving():
                session.score(root, tree)
            kept = [PATHS[(number + row) % len(PATHS)] for row in range(len(rows))]
            deepest = max(map(len, kept))
            path = torch.tensor([[*each, *[-1] * (deepest - len(each))] for each in kept])
            session.keep(path, torch.tensor([1 + len(each) for each in kept]))
            for row, each in enumerate(kept):
                rows[row] += [int(root[row]), *(int(tree.tokens[row, node]) for node in each)]
        longest, slots = int(session.lengths.max()), session.engine.slots
        assert slots < longest + 2 * SPARE, f"{slots} slots for rows of at most {longest} tokens"
        self._scores_like_the_target(session, rows)

    def test_rows_leave(self) -> None:
        """The rows that remain go on, in their new order, before and after a compaction."""
        for compacted in (False, True):
            session, rows = self.session(), [list(prompt) for prompt in PROMPTS]
            left = list(range(len(rows) - 1))[::-1]  # a longest one leaves
            session.select(torch.tensor(left))
            if compacted:
                session.compact()
            self._scores_like_the_target(session, [rows[row] for row in left])
            session.select(torch.tensor([len(left) - 1]))
            self._scores_like_the_target(session, [rows[left[-1]]])

    def test_it_counts_its_slots(self) -> None:
        """Each pass adds its tokens; ``start`` empties the cache, ``compact`` drops the rest."""
        engine = self.bound()
        for _ in range(2):
            engine.start(2, 16)
            assert engine.slots == 0, "start did not empty the cache"
            engine.run(torch.ones(2, 3).long(), torch.arange(3).expand(2, -1), None, None)
            assert engine.slots == 3, f"{engine.slots} slots after a pass over 3 tokens"
            engine.compact(torch.tensor([[0, 2], [1, 2]]))
            assert engine.slots == 2, f"{engine.slots} slots after all but 2 were dropped"

    def test_it_returns_the_logits_that_are_asked_for(self) -> None:
        """``logits_of`` chooses places; without it there are logits of all tokens."""
        tokens, places = torch.tensor([[3, 1, 4, 1, 5]]), torch.arange(5)[None]
        found = []
        for wanted in (None, torch.tensor([1, 4])):
            engine = self.bound()
            engine.start(1)
            logits, features = engine.run(tokens, places, None, wanted)
            assert features.shape[:2] == (1, 5), f"features are {tuple(features.shape)}"
            found.append(logits)
        self._close(found[1], found[0][:, [1, 4]], "the logits of logits_of")

    def test_it_returns_no_features_unless_asked(self) -> None:
        """Without layers, the features have width 0."""
        engine = self.bound(())
        engine.start(2)
        masks = TreeAttention(tiny_target.target()).causal(torch.arange(2).expand(2, -1))
        tokens = torch.tensor([[1, 2], [3, 4]])
        _, features = engine.run(tokens, torch.arange(2).expand(2, -1), masks, None)
        assert features.shape == (2, 2, 0), f"features are {tuple(features.shape)}"

    def test_a_compiled_pass_computes_the_same(self) -> None:
        """With a cache, masks and changed weights; for an engine with ``compile``."""
        engine = self.bound()
        if not isinstance(engine, CompilingEngine):
            return
        source = AttentionPass()
        passes = [engine.compile(source), EagerPass(source)]
        for factor in (1, 2):
            source.weight *= factor
            for each in passes:
                each.start(2)
                assert each.slots == 0, "start did not empty the cache of a pass"
            for count in (3, 2, 1):
                given = source.example(2, count, passes[1].slots)
                given["mask"][0, :, :, 1] = torch.finfo(torch.float32).min
                found, expected = (each.run(given) for each in passes)
                self._close(found["read"], expected["read"], f"a pass over {count} entries")
                assert passes[0].slots == passes[1].slots, "a pass counts its slots differently"
                if count == 2:
                    for each in passes:
                        each.compact(torch.tensor([[0, 2, 3], [1, 2, 4]]))

    def test_the_target_is_left_alone(self) -> None:
        """After a decoding, the target has its own weights, hooks and attention."""
        session = self.session()
        target = session.model
        weights = {name: weight.clone() for name, weight in target.state_dict().items()}
        before = _hooks(target), target.config._attn_implementation
        with torch.inference_mode(), session.serving():
            session.score(*_tree(0))
        assert (_hooks(target), target.config._attn_implementation) == before, "the target changed"
        for name, weight in target.state_dict().items():
            same(weight, weights[name], f"{name} of the target changed")

    def test_a_layer_that_the_target_lacks_is_refused(self) -> None:
        """The error is one of the user's, who chose the drafter."""
        try:
            self.bound((tiny_target.LAYERS + 1,))
        except UserError:
            return
        raise AssertionError("it accepted a hidden state that the target does not have")

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Run a prompt that depends on the step."""
        component.bind(tiny_target.target(), LAYERS)
        component.start(1)
        tokens = torch.tensor([PROMPTS[step % len(PROMPTS)]])
        places = torch.arange(tokens.shape[1])[None]
        return list(component.run(tokens, places, None, None))

    def _scores_like_the_target(self, session: Session, rows: list[list[int]]) -> None:
        root, tree = _tree(7, len(rows))
        with torch.inference_mode(), session.serving():
            logits = session.score(root, tree)
        session.keep(torch.zeros(len(rows), 0).long(), torch.zeros(len(rows)).long())
        for row, before in enumerate(rows):
            for path in PATHS:
                nodes = [int(tree.tokens[row, node]) for node in path]
                slots = [0, *(1 + node for node in path)]
                tokens = torch.tensor([[*before, int(root[row]), *nodes]])
                with torch.no_grad():
                    plain = session.model(tokens, output_hidden_states=True, use_cache=False)
                expected = plain.logits[0, len(before) :]
                self._close(logits[row, slots], expected, f"the logits of row {row}, path {path}")
                hidden = torch.cat([plain.hidden_states[layer][0] for layer in LAYERS], -1)
                found = session.features[row, slots]
                self._close(found, hidden[len(before) :], f"the features of row {row}, path {path}")

    def _close(self, found: Tensor, expected: Tensor, what: str) -> None:
        off = (found - expected).abs().max() / expected.abs().max()
        assert off <= self.tolerance, f"{what} differ by {float(off):.1e} of the largest"


def _padded() -> tuple[Tensor, Tensor]:
    """The prompts, padded on the right, and their lengths."""
    width = max(map(len, PROMPTS))
    padded = [[*prompt, *[5] * (width - len(prompt))] for prompt in PROMPTS]
    return torch.tensor(padded), torch.tensor([len(prompt) for prompt in PROMPTS])


def _tree(seed: int, rows: int = len(PROMPTS)) -> tuple[Tensor, DraftTree]:
    """Random roots [B] and a tree, which a pass scores."""
    random = torch.Generator().manual_seed(seed)
    shape = shape_of(torch.tensor([PARENTS]))
    tokens = torch.randint(CLASSES, (rows, 1 + len(PARENTS)), generator=random)
    nodes = tokens[:, 1:]
    return tokens[:, 0], DraftTree(nodes, shape, torch.ones_like(nodes, dtype=torch.bool))


def _hooks(model: Any) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
