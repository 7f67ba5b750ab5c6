"""EAGLE-3 against its equations, and its decoding against its training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcore.decoding.tree import DraftTree, chain
from kdcore.errors import UserError
from kdcore_baselines.drafters import eagle3_attention
from kdcore_baselines.drafters.eagle3_attention import by_blocks, by_flex
from kdcore_baselines.drafting_components import BestFirstParams, DynamicParams
from kdcore_baselines.trees import BestFirst, Dynamic
from tests.reference.drafting.eagle3 import eagle3
from tests.tiny.targets import FAMILIES, generated, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import batch_of, bound, decode, hidden_in_training, unbound

DEPTH = 4


@pytest.mark.parametrize("layer", [{}, {"ffn": 20, "heads": 2, "key_heads": 1, "theta": 50.0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_what_decoding_one_token_after_the_other_gives(family: str, layer: dict) -> None:
    target = tiny(family)
    drafter = bound("eagle3", target, depth=DEPTH, layer=layer).double()
    (row,) = prompts(1)
    tokens = batch_of([row]).inputs["input_ids"]
    features = torch.randn(1, len(row), 3 * 32, dtype=torch.float64)
    with torch.no_grad():
        hidden = drafter(tokens, features)
    embedded = target.get_input_embeddings()(tokens)[0].detach().double()
    weights = drafter.state_dict()
    expected = eagle3(features[0], embedded, weights, drafter.layer_size, DEPTH)
    assert hidden.shape == (1, len(row), DEPTH, 32)
    # the angles of RoPE are float32
    gap = (hidden[0, : len(expected)] - expected).abs().max()
    assert gap < 1e-5 * expected.abs().max()


def passes(length: int, count: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of some passes: 2 rows, 4 heads that share 2 key heads."""
    torch.manual_seed(0)
    shapes = (2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8)
    return [tuple(torch.randn(s, requires_grad=True) for s in shapes) for _ in range(count)]


def by_definition(given: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Attention of the last pass over all keys at once, under a mask."""
    length, heads = given[0][0].shape[2], 4 // 2
    own = torch.eye(length, dtype=torch.bool)
    sees = torch.cat([own.new_ones(own.shape).tril(), *[own] * (len(given) - 1)], dim=1)
    keys, values = (
        torch.cat([each[which] for each in given], dim=2).repeat_interleave(heads, 1)
        for which in (1, 2)
    )
    return torch.nn.functional.scaled_dot_product_attention(
        given[-1][0], keys, values, attn_mask=sees
    )


def plain_flex(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **_: Any) -> Any:
    """Flex attention with the causal mask; torch's has no backward pass on the CPU."""
    key, value = (each.repeat_interleave(2, 1) for each in (key, value))
    later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.mT * scale).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ value, SimpleNamespace(lse=scores.logsumexp(-1))


FORMS = {
    "blocks": lambda *given: by_blocks(*given, block=3),
    "one block": lambda *given: by_blocks(*given, block=64),
    "flex": lambda *given: by_flex(*given, plain_flex),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_attention_of_a_pass_and_its_gradients_are_those_of_the_whole_mask(form: Any) -> None:
    given = passes(7)
    found = form(given[-1][0], [each[1] for each in given], [each[2] for each in given])
    expected = by_definition(given)
    torch.testing.assert_close(found, expected)
    inputs = [*(key for _, key, _ in given), *(value for *_, value in given), given[-1][0]]
    toward = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, inputs, toward) for each in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_gives_what_the_form_for_accelerators_expects() -> None:
    given = [tuple(each.detach() for each in one) for one in passes(7)]
    keys, values = ([each[which] for each in given] for which in (1, 2))
    found = by_flex(given[-1][0], keys, values, flex_attention)
    torch.testing.assert_close(found, by_definition(given))


class Largest(TorchDispatchMode):
    """The most numbers that one operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return found


def test_memory_of_the_training_passes_grows_with_the_length_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eagle3_attention, "BLOCK", 8)
    largest = []
    for length in (64, 128):
        attend = eagle3_attention.Unrolled()
        with Largest() as seen:
            torch.stack([attend(*each) for each in passes(length)]).sum().backward()
        largest.append(seen.numbers)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 2 * 4 * 128 * 128


class Following:
    """A tree that drafts what the target will say, beside beams that it will not."""

    def __init__(self, rows: list[list[int]], lengths: Tensor) -> None:
        self.rows, self.lengths = rows, lengths

    def grow(self, logp, following, depth, active) -> DraftTree:
        real = torch.stack(
            [
                torch.tensor((row[length:] + [7] * depth)[:depth])
                for row, length in zip(self.rows, self.lengths.tolist(), strict=True)
            ]
        )
        place = torch.zeros(len(real), 1, dtype=torch.int64)
        for level in range(depth - 1):
            wrong = (real[:, level, None] + torch.tensor([3, 0, 5])) % 61
            following(place.expand(-1, 3), wrong)
            place = torch.ones_like(place)
        return DraftTree(real, chain(depth, real.device), active[:, None].expand_as(real))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("known", [DEPTH, 2])
def test_decoding_computes_the_hidden_states_of_training(
    family: str, rows: int, known: int
) -> None:
    """Of the newest token and of each draft that follows, whatever else was drafted beside it.

    Only the first ``known`` drafts of a round are right, so that in every round but few are kept.
    """
    target, began = tiny(family), prompts(rows)
    drafter = bound("eagle3", target, depth=DEPTH)
    answers = generated(target, began, 24 + DEPTH)
    whole = [before + after for before, after in zip(began, answers, strict=True)]
    trained = hidden_in_training(drafter, target, whole)
    drafter.tree = Following(whole, torch.ones(rows, dtype=torch.int64))
    logp, propose = drafter.logp, drafter.propose
    compared = set()
    levels = []

    def heard(hidden):
        levels.append(hidden if hidden.ndim == 2 else hidden[:, 1])
        return logp(hidden)

    def checked(tokens, features, lengths, generator):
        drafter.tree.lengths = drafter.tree.lengths + lengths
        levels.clear()
        tree = propose(tokens, features, lengths, generator)
        assert len(levels) == DEPTH
        for row in lengths.nonzero()[:, 0].tolist():
            anchor = int(drafter.tree.lengths[row]) - 2
            for level, hidden in enumerate(levels):
                if anchor + level + 2 > len(whole[row]):
                    continue
                expected = trained[row, anchor, level]
                gap = (hidden[row] - expected).abs().max()
                assert gap < 1e-3 * max(1, expected.abs().max()), (row, anchor, level)
                compared.add((row, anchor, level))
        wrong = (tree.tokens + 1) % 61
        kept = torch.arange(DEPTH) < known
        return DraftTree(torch.where(kept, tree.tokens, wrong), tree.shape, tree.mask)

    drafter.logp, drafter.propose = heard, checked
    assert decode(drafter, target, began, 24) == [answer[:24] for answer in answers]
    assert len(compared) >= rows * DEPTH * 24 // (known + 1)


def test_the_first_rounds_of_rows_of_one_token_read_their_own_drafts() -> None:
    """Their cache is empty then, and beams of a row read no other row's."""
    target = tiny("llama")
    began = [[7], [9]]
    drafter = bound("eagle3", target, depth=DEPTH)
    assert decode(drafter, target, began, 12) == generated(target, began, 12)


def test_its_head_begins_as_the_targets_rows() -> None:
    target = tiny("llama")
    drafter = unbound("eagle3", vocabulary=5)
    drafter.bind(target, tokenizer_of())
    counts = torch.zeros(61, dtype=torch.int64)
    counts[[60, 3, 17, 20, 41]] = 1
    drafter.choose_vocabulary(counts)
    rows = target.get_output_embeddings().weight[[3, 17, 20, 41, 60]]
    assert drafter.head.weight.equal(rows)
    assert drafter.head.weight.requires_grad
    assert drafter.norm.weight.allclose(target.model.norm.weight)


def test_a_tree_of_distributions_that_are_known_together_is_refused() -> None:
    with pytest.raises(UserError, match="BestFirst requires all distributions"):
        unbound("eagle3", tree="bestfirst")
    drafter = unbound("eagle3")
    with pytest.raises(UserError, match="choose the tree dynamic, autotune, backbone or chain"):
        drafter.tree = BestFirst(BestFirstParams(), None)
    drafter.tree = Dynamic(DynamicParams(), None)


def test_hidden_states_that_the_target_lacks_are_refused() -> None:
    with pytest.raises(UserError, match="hidden state 9"):
        unbound("eagle3", features=(0, 9)).bind(tiny("llama"), tokenizer_of())
