"""Rounds that do not ask the drafter: what it drafts afterwards, and what the target emits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.decoding.drafters.backlog import Backlog
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree
from kdcore.testing.decoding.draft_trees import row_of
from kdcore_baselines import verifiers
from kdcore_baselines.drafters.untrained import Ngram
from kdcore_baselines.drafting_components import NgramParams, TypicalParams
from kdcore_baselines.verifiers import Greedy
from kdcore_compiled.engine import CompiledEngine
from kdcore_compiled.plugin import CompiledParams
from kdcore_openvino.engine import OpenVinoEngine
from kdcore_openvino.plugin import OpenVinoParams
from tests.tiny.drafters import Pauses
from tests.tiny.targets import generated, padded, prompts, tiny
from tests.tiny.trained_drafters import bound, proposed_at_once

SMALL: dict[str, dict[str, Any]] = {
    "eagle3": {"depth": 3, "tree": {"name": "dynamic", "beams": 4, "nodes": 20}},
    "fasteagle": {"depth": 3, "tree": {"name": "backbone", "k": 20}},
    "medusa": {"depth": 3, "tree": {"name": "backbone", "k": 20}},
    "p_eagle": {"depth": 3, "layers": 2, "tree": {"name": "backbone", "k": 20}},
    "dflash": {"depth": 3, "layers": 2, "tree": {"name": "backbone", "k": 20}},
}
COUNT = 30
RARELY = (False, False, True, False, False, False, False, True, True)
VERIFIERS = {
    "greedy": Greedy(None, None),
    "sampling": verifiers.Sampling(None, None),
    "typical": verifiers.Typical(TypicalParams(), None),
    "chain_sampling": verifiers.ChainSampling(None, None),
}


def pausing(name: str, target: Any, **params: Any) -> Any:
    drafter = bound(name, target, **SMALL[name] | params)
    drafter.tree.account = Pauses(*RARELY)
    return drafter


def test_rounds_of_rows_of_different_lengths_become_one() -> None:
    """Tokens 10 r + place, each with its own number as the feature; row 1 is done at the end."""
    backlog = Backlog()
    for tokens, lengths in (
        ([[10, 11, 0], [20, 0, 0], [0, 0, 0]], [2, 1, 0]),
        ([[12], [21], [30]], [1, 1, 1]),
        ([[13, 0], [0, 0], [31, 32]], [1, 0, 2]),
    ):
        each = torch.tensor(tokens)
        backlog.add(each, each[:, :, None].float(), torch.tensor(lengths))
    tokens, features, lengths = backlog.take(torch.tensor([True, False, True]))
    assert lengths.tolist() == [4, 0, 3]
    assert tokens[0, :4].tolist() == [10, 11, 12, 13] and tokens[2, :3].tolist() == [30, 31, 32]
    assert features.squeeze(-1).long().equal(tokens)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rows", [1, 3])
def test_after_rounds_without_it_a_drafter_drafts_as_if_it_had_read_the_row_at_once(
    name: str, rows: int
) -> None:
    target = copy.deepcopy(tiny("llama")).double()  # no near ties
    drafter = pausing(name, target).double()
    tokens_of = [row[:1] for row in prompts(rows)]
    drafted: list[tuple[list[list[int]], Tensor, DraftTree]] = []
    propose = drafter.propose

    def heard(tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any) -> DraftTree:
        for row, new, count in zip(tokens_of, tokens.tolist(), lengths.tolist(), strict=True):
            row += new[:count]
        tree: DraftTree = propose(tokens, features, lengths, generator)
        drafted.append(([[*row] for row in tokens_of], lengths, tree))
        return tree

    drafter.propose = heard
    decoder = Decoder(target, drafter, Greedy(None, None))
    answers = decoder.generate(*padded(prompts(rows)), Stop(COUNT))
    assert answers == generated(target, prompts(rows), COUNT)
    asked = drafter.tree.account.learned
    assert asked.count(True) == len(drafted) >= 3 and asked[0] is False

    alone = bound(name, target, **SMALL[name]).double()
    session = Session(target, alone.layers)
    for contexts, lengths, tree in drafted:
        for row in lengths.nonzero()[:, 0].tolist():
            expected = proposed_at_once(alone, session, contexts[row])
            assert row_of(tree, row) == row_of(expected, 0)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("name", SMALL)
def test_every_verifier_emits_the_targets_tokens(name: str, verifier: str) -> None:
    target, rows = tiny("gemma3"), prompts(3)
    tree = {"tree": {"name": "chain"}} if verifier == "chain_sampling" else {}
    drafter = pausing(name, target, **tree)
    decoder = Decoder(target, drafter, VERIFIERS[verifier])
    assert decoder.generate(*padded(rows), Stop(COUNT)) == generated(target, rows, COUNT)
    assert 0 < decoder.counter.undrafted < decoder.counter.rounds


@pytest.mark.parametrize("name", ["fasteagle", "eagle3", "p_eagle"])
@pytest.mark.parametrize("engine_name", ["openvino", "compiled"])
def test_engines_that_run_the_drafter_emit_the_targets_tokens(
    name: str, engine_name: str, cache: None
) -> None:
    """And draft what torch drafts: the same numbers of nodes are accepted."""
    target, rows = tiny("llama"), prompts(3)
    counters = []
    for runs in (False, True):
        drafter = pausing(name, target)
        engine: Any = (
            OpenVinoEngine(OpenVinoParams(), None)  # type: ignore[arg-type]
            if engine_name == "openvino"
            else CompiledEngine(CompiledParams())
        )
        engine.bind(target, drafter.layers)
        drafter.use_engine(engine if runs else None)
        decoder = Decoder(target, drafter, Greedy(None, None), engine=engine)
        with torch.compiler.set_stance("force_eager"):
            answers = decoder.generate(*padded(rows), Stop(COUNT))
        assert answers == generated(target, rows, COUNT)
        counters.append((decoder.counter.accepted, decoder.counter.undrafted))
    assert counters[0] == counters[1]


@pytest.fixture
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path))


def test_a_decoder_may_draft_in_each_round() -> None:
    target, rows = tiny("llama"), prompts(3)
    drafter = pausing("fasteagle", target)
    decoder = Decoder(target, drafter, Greedy(None, None))
    decoder.always_draft()
    assert decoder.generate(*padded(rows), Stop(COUNT)) == generated(target, rows, COUNT)
    assert decoder.counter.undrafted == 0


def test_an_ngram_without_a_match_has_no_nodes_to_verify() -> None:
    drafter = Ngram(NgramParams(), None)
    drafter.start(torch.tensor([1, 1]))
    no_features = torch.zeros(2, 3, 0)
    tree = drafter.propose(
        torch.tensor([[2, 3, 4], [5, 6, 7]]), no_features, torch.tensor([3, 3]), None
    )
    assert tree.tokens.shape == (2, 0)
    tree = drafter.propose(torch.tensor([[2], [8]]), no_features[:, :1], torch.tensor([1, 1]), None)
    assert tree.mask.any(1).tolist() == [True, False]
