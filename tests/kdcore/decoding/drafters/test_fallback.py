"""Two drafters in one: which of them drafts, and what the target emits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.components.registry import installed
from kdcore.decoding.build import build_before_target
from kdcore.decoding.drafters.fallback import FallbackDrafter
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.decoding.trials.round_cost import REPEATS, measured_cost
from kdcore.errors import UserError
from kdcore.specs.parts.decoding import DraftingSpec, SamplingSpec
from kdcore.testing.decoding.draft_trees import row_of
from kdcore_baselines import verifiers
from kdcore_baselines.drafters.suffix import Suffix
from kdcore_baselines.drafters.untrained import Ngram
from kdcore_baselines.drafting_components import NgramParams, SuffixParams, TypicalParams
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import generated, padded, prompts, tiny
from tests.tiny.trained_drafters import bound, proposed_at_once

COUNT = 30


class Sometimes:
    """Drafts the newest token again, and once more, in one of three rounds of each row."""

    layers = ()

    def bind(self, target: Any, tokenizer: Any) -> None: ...

    def start(self, first: Tensor) -> None:
        self.round = 0

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any
    ) -> DraftTree:
        self.round += 1
        rows = torch.arange(len(tokens))
        drafts = (lengths > 0) & ((rows + self.round) % 3 == 0)
        newest = tokens[rows, (lengths - 1).clamp(min=0), None].expand(-1, 2)
        width = 2 if drafts.any() else 0
        mask = drafts[:, None].expand(-1, width)
        return DraftTree(newest[:, :width], shape_of(torch.tensor([[-1, 0][:width]]).long()), mask)


def heard(drafter: Any) -> list[tuple[Tensor, Tensor, DraftTree]]:
    """The tokens, the lengths and the tree of each proposal from now on."""
    found: list[tuple[Tensor, Tensor, DraftTree]] = []
    propose = drafter.propose

    def noted(tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any) -> DraftTree:
        tree: DraftTree = propose(tokens, features, lengths, generator)
        found.append((tokens, lengths, tree))
        return tree

    drafter.propose = noted
    return found


@pytest.mark.parametrize("name", ["fasteagle", "eagle3", "medusa"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_falls_back_where_the_first_drafts_nothing(name: str, rows: int) -> None:
    target = copy.deepcopy(tiny("llama")).double()  # no near ties
    first, fallback = Sometimes(), bound(name, target, depth=3).double()
    asked_first, asked = heard(first), heard(fallback)
    both = FallbackDrafter(first, fallback)
    joined = heard(both)
    decoder = Decoder(target, both, Greedy(None, None))
    decoder.always_draft()
    assert decoder.generate(*padded(prompts(rows)), Stop(COUNT)) == generated(
        target, prompts(rows), COUNT
    )
    assert 2 < len(asked) < len(asked_first) or rows > 1

    alone, session = bound(name, target, depth=3).double(), Session(target, fallback.layers)
    contexts = [row[:1] for row in prompts(rows)]
    from_both = {True: 0, False: 0}
    for (tokens, lengths, ours), (_, _, tree) in zip(asked_first, joined, strict=True):
        for row, (new, count) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            contexts[row] = contexts[row] + new[:count]
            if not count:
                continue
            drafted = bool(ours.mask.shape[1] and ours.mask[row].any())
            from_both[drafted] += 1
            if drafted:
                assert row_of(tree, row) == row_of(ours, row)
                continue
            expected = proposed_at_once(alone, session, contexts[row])
            assert row_of(tree, row) == row_of(expected, 0)
    assert min(from_both.values()) >= 2


@pytest.mark.parametrize(
    "verifier",
    [
        Greedy(None, None),
        verifiers.Sampling(None, None),
        verifiers.Typical(TypicalParams(), None),
    ],
)
@pytest.mark.parametrize(
    "first", [Suffix(SuffixParams(least=0.5), None), Ngram(NgramParams(), None)]
)
def test_every_verifier_emits_the_targets_tokens(first: Any, verifier: Any) -> None:
    target, rows = tiny("gemma3"), prompts(3)
    both = FallbackDrafter(first, bound("fasteagle", target, depth=3))
    decoder = Decoder(target, both, verifier)
    decoder.always_draft()
    assert decoder.generate(*padded(rows), Stop(COUNT)) == generated(target, rows, COUNT)


def test_the_cost_of_a_proposal_is_that_of_the_fallback() -> None:
    """The first one knows what followed a token that it has read."""
    target = tiny("llama")
    fallback = bound("fasteagle", target, depth=2)
    asked = heard(fallback)
    first = Suffix(SuffixParams(), None)
    measured_cost(Session(target, fallback.layers), FallbackDrafter(first, fallback))
    assert len(asked) == 2 + REPEATS


def test_what_cannot_be_combined_is_refused() -> None:
    target = tiny("llama")
    medusa = bound("medusa", target, depth=2)
    with pytest.raises(UserError, match="Medusa reads hidden states"):
        FallbackDrafter(medusa, Suffix(SuffixParams(), None))

    def built(**said: Any) -> None:
        context = {"registry": installed()}
        spec = DraftingSpec.model_validate(said, context=context)
        build_before_target(spec, SamplingSpec(temperature=1.0), installed())

    built(first="suffix", drafter="ngram")
    with pytest.raises(ValueError, match="set drafter or folder too"):
        built(first="suffix")
    with pytest.raises(UserError, match="follows a single chain, and two drafters propose a tree"):
        built(first="suffix", drafter="ngram", verifier="chain_sampling")
