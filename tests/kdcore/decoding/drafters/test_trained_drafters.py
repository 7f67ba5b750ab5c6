"""What holds for every drafter with weights."""

from __future__ import annotations

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from kdcore.decoding.protocols import TrainedDrafter
from kdcore.errors import UserError
from kdcore.method.logits import Head
from kdcore.training.views import DrafterView
from tests.tiny.targets import CLASSES, FAMILIES, generated, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import (
    anchored,
    batch_of,
    bound,
    decode,
    hidden_in_training,
    losses,
    unbound,
)

SMALL: dict[str, dict] = {
    "eagle3": {"depth": 3, "tree": {"name": "dynamic", "beams": 4, "nodes": 20}},
    "fasteagle": {"depth": 3, "tree": {"name": "backbone", "k": 20}},
    "medusa": {"depth": 3, "tree": {"name": "backbone", "k": 20}},
    "p_eagle": {"depth": 3, "layers": 2, "tree": {"name": "backbone", "k": 20}},
    "dflash": {"depth": 3, "layers": 2, "tree": {"name": "backbone", "k": 20}},
}
GROWING = [{"name": "chain"}, {"name": "backbone", "k": 4}, {"name": "dynamic", "nodes": 16}]
TREES = {"eagle3": [*GROWING, {"name": "dynamic", "beams": 1}, {"name": "autotune", "beams": 3}]}
DRAFTERS = list(SMALL)
AT_ONCE = [name for name in DRAFTERS if name != "eagle3"]
"""Those whose levels come from one pass: each has any tree."""


@pytest.mark.parametrize("name", DRAFTERS)
def test_it_fits_the_protocol_and_owns_nothing_of_the_target(name: str) -> None:
    target = tiny("llama", tie_word_embeddings=False)
    drafter = bound(name, target, **SMALL[name])
    assert isinstance(drafter, TrainedDrafter)
    of_target = {weight.data_ptr() for weight in target.parameters()}
    stored = drafter.state_dict()
    assert {weight.data_ptr() for weight in stored.values()}.isdisjoint(of_target)
    assert set(dict(drafter.named_parameters())) == set(stored)
    assert all(weight.dtype == torch.float32 for weight in drafter.parameters())
    drafter.to("meta")
    assert target.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "family", "rows"),
    [
        *itertools.product(AT_ONCE, FAMILIES, [3]),
        *((name, family, 1) for name, family in zip(AT_ONCE, FAMILIES, strict=False)),
    ],
)
def test_decoding_computes_the_hidden_states_of_training(name: str, family: str, rows: int) -> None:
    """Of each row's newest token, in each round, whatever was accepted in the rounds before."""
    target = tiny(family)
    drafter = bound(name, target, **SMALL[name])
    served, counts = [], []
    logp, propose = drafter.logp, drafter.propose

    def heard(hidden):
        served.append(hidden)
        return logp(hidden)

    def counted(tokens, features, lengths, generator):
        counts.append(lengths)
        return propose(tokens, features, lengths, generator)

    drafter.logp, drafter.propose = heard, counted
    began = prompts(rows)
    emitted = decode(drafter, target, began, 24)
    whole = [before + after for before, after in zip(began, emitted, strict=True)]
    trained = hidden_in_training(drafter, target, whole)
    lengths = torch.ones(rows, dtype=torch.int64)
    different = False
    assert len(served) == len(counts) > 5
    for hidden, count in zip(served, counts, strict=True):
        lengths += count
        different |= len(set(count[count > 0].tolist())) > 1
        for row in count.nonzero()[:, 0].tolist():
            # the newest token stands at the length less one, in the pair of the row before it
            expected = trained[row, lengths[row] - 2]
            assert (hidden[row] - expected).abs().max() < 1e-3 * max(1, expected.abs().max())
    assert different or rows == 1


@functools.cache
def plain(family: str, rows: int) -> list[list[int]]:
    """What transformers decodes: every drafter and every tree is held to the same tokens."""
    return generated(tiny(family), prompts(rows), 16)


@pytest.mark.parametrize(("name", "family"), [*itertools.product(DRAFTERS, FAMILIES)])
def test_greedy_output_is_that_of_plain_decoding(name: str, family: str) -> None:
    """By two trees: over all pairs, each drafter and each family meets every tree."""
    target = tiny(family)
    trees = TREES.get(name, [*GROWING, {"name": "bestfirst"}, {"name": "autotune"}])
    dealt = DRAFTERS.index(name) + FAMILIES.index(family)
    for place, rows in ((dealt, 3), (dealt + 1, 1)):
        tree = trees[place % len(trees)]
        drafter = bound(name, target, **SMALL[name] | {"tree": tree})
        assert decode(drafter, target, prompts(rows), 16) == plain(family, rows)


@pytest.mark.parametrize("name", DRAFTERS)
def test_it_drafts_in_bfloat16_what_it_does_in_float32(name: str) -> None:
    rounded = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    drafter = bound(name, rounded, **SMALL[name]).to(torch.bfloat16)
    single = copy.deepcopy(rounded).float()
    copied = bound(name, single, **SMALL[name])
    copied.load_state_dict(drafter.state_dict())
    first = []
    for each, target in ((drafter, rounded), (copied, single)):
        read, logp = [], each.logp
        each.logp = lambda hidden, read=read, logp=logp: read.append(logp(hidden)) or read[-1]
        decode(each, target, prompts(3), 16)
        assert {weight.dtype for weight in each.parameters()} == {target.dtype}
        first.append(read[0])
    assert first[0].dtype == torch.float32
    torch.testing.assert_close(*first, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", DRAFTERS)
def test_it_can_be_trained_after_it_has_decoded(name: str) -> None:
    """What decoding made in inference mode and kept, no gradient could pass."""
    target = tiny("llama")
    drafter = bound(name, target, vocabulary=40, **SMALL[name])
    decode(drafter, target, prompts(1), 8)
    first, last = losses(drafter, target, METHODS["plain"], steps=2)
    assert last != first


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_reduced_vocabulary_is_what_it_proposes(name: str) -> None:
    target = tiny("llama")
    drafter = bound(name, target, **SMALL[name] | {"vocabulary": 25})
    counts = torch.zeros(CLASSES, dtype=torch.int64)
    frequent = torch.randperm(CLASSES)[:24].sort().values
    counts[frequent] = torch.arange(1, 25)
    drafter.choose_vocabulary(counts)
    first_of_the_rest = next(n for n in range(CLASSES) if n not in frequent.tolist())
    assert drafter.vocabulary.tolist() == sorted([*frequent.tolist(), first_of_the_rest])
    assert drafter.head.weight.shape == (25, 32)

    proposed = []
    propose = drafter.propose
    drafter.propose = lambda *given: proposed.append(propose(*given)) or proposed[-1]
    assert decode(drafter, target, prompts(3), 16) == plain("llama", 3)
    assert torch.isin(torch.cat([t.tokens.flatten() for t in proposed]), drafter.vocabulary).all()
    del drafter.propose

    again = bound(name, target, seed=1, **SMALL[name] | {"vocabulary": 25})
    assert again.head.weight.shape == (25, 32)
    again.load_state_dict(drafter.state_dict())
    assert again.vocabulary.equal(drafter.vocabulary)
    assert again.head.weight.equal(drafter.head.weight)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_stored_drafter_is_the_one_it_was(name: str) -> None:
    target = tiny("llama")
    drafter = bound(name, target, **SMALL[name])
    again = bound(name, target, seed=1, **SMALL[name])
    before = hidden_in_training(drafter, target, prompts(3))
    assert not torch.equal(before, hidden_in_training(again, target, prompts(3)))
    again.load_state_dict(drafter.state_dict())
    assert torch.equal(before, hidden_in_training(again, target, prompts(3)))


@pytest.mark.parametrize("name", DRAFTERS)
def test_it_refuses_what_does_not_fit(name: str) -> None:
    target = tiny("llama")
    with pytest.raises(UserError, match="has 61 tokens"):
        unbound(name, vocabulary=62).bind(target, tokenizer_of())
    wide = SimpleNamespace(
        get_output_embeddings=lambda: torch.nn.Linear(16, 61, bias=False),
        get_input_embeddings=target.get_input_embeddings,
        config=target.config,
    )
    with pytest.raises(
        UserError, match="width 32, but its embedding has width 32 and its head has width 16"
    ):
        unbound(name).bind(wide, tokenizer_of())
    wide.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="does not have a linear head"):
        unbound(name).bind(wide, tokenizer_of())


METHODS = {
    "plain": {},
    "gated": {"gates": ["speckd", "discount"], "terms": {"task": 0.5}},
    "by level": {
        "splitters": [{"name": "by_position", "positions": 3}],
        "momentum": {"name": "per_term", "overrides": {"kd_1": 0.5}},
        "terms": {"feature": 0.1},
    },
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_by_any_method(name: str, method: str) -> None:
    """Each drafter and each method also with a reduced vocabulary."""
    target = tiny("llama")
    vocabulary = [None, 40][(DRAFTERS.index(name) + list(METHODS).index(method)) % 2]
    drafter = bound(name, target, **SMALL[name] | {"vocabulary": vocabulary})
    seen = losses(drafter, target, METHODS[method])
    assert seen[-1] < 0.9 * seen[0]


class Oracle(torch.nn.Module):
    """Says the token at r + 1 + i at level i of anchor r, as a one-hot."""

    depth, layers, vocabulary = 3, (1,), None
    head = Head(torch.eye(CLASSES))

    def forward(self, tokens, features):
        after = [tokens.roll(-1 - level, dims=1) for level in range(1, 1 + self.depth)]
        return torch.nn.functional.one_hot(torch.stack(after, dim=2), CLASSES).float()


def test_labels_and_the_target_stand_where_the_levels_predict() -> None:
    target, oracle, rows = tiny("llama"), Oracle(), prompts(3)
    batch = anchored(rows, oracle)
    drafted, of_target = DrafterView(target, oracle)(oracle, batch)
    labels = batch.labels[batch.mask]
    assert drafted.from_linear(drafted.hidden).argmax(-1).equal(labels)
    plain = batch_of(rows).inputs
    logits = target(**plain).logits
    anchors, levels = batch.mask.nonzero(as_tuple=True)
    width = plain["input_ids"].shape[1]
    # what the target predicts the same token from: the position before it, r + i
    expected = logits[anchors // width, anchors % width + levels + 1]
    assert torch.allclose(of_target.logits(slice(None)), expected, atol=1e-4)
    assert plain["input_ids"][anchors // width, anchors % width + levels + 2].equal(labels)
    assert len(labels) == sum(max(len(row) - 1 - i, 0) for row in rows for i in (1, 2, 3))
