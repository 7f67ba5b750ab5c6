"""What the whole loop emits at temperature 1 against the target's own distribution, enumerated."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import Drafter, Verifier
from kdcore.decoding.sampling import Sampling
from kdcore.decoding.tree import DraftTree
from kdcore.testing.decoding.draft_trees import p_value
from kdcore_baselines import verifiers
from kdcore_baselines.drafters.untrained import SmallModel
from kdcore_baselines.drafting_components import ModelParams, TypicalParams
from kdcore_baselines.trees import Backbone
from tests.tiny.drafters import Pauses
from tests.tiny.targets import Loads, tiny, tokenizer_of

CLASSES = 4
COUNT = 3
ROWS, BATCHES = 10_000, 2
PROMPT = [2, 0, 3]
SIZE = {"vocab_size": CLASSES, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 1, "num_key_value_heads": 1}
TARGET = tiny("llama", **SIZE, initializer_range=0.6)


def exact(temperature: float) -> dict[tuple[int, ...], float]:
    """The chance of each continuation of COUNT tokens."""
    continuations = list(itertools.product(range(CLASSES), repeat=COUNT))
    ids = torch.tensor([PROMPT + list(tokens) for tokens in continuations])
    with torch.no_grad():
        logp = (TARGET(ids).logits.double() / temperature).log_softmax(-1)
    taken = logp[:, len(PROMPT) - 1 : -1].gather(2, ids[:, len(PROMPT) :, None])
    return dict(zip(continuations, taken.sum((1, 2)).exp().tolist(), strict=True))


class Fixed:
    """Two candidates at each of three depths, the same for every row and round."""

    layers = ()
    tree = Backbone(k=2)
    levels = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(4))

    def bind(self, target, tokenizer) -> None: ...

    def start(self, first: Tensor) -> None: ...

    def propose(self, tokens: Tensor, features: Tensor, lengths: Tensor, generator) -> DraftTree:
        return self.tree(self.levels.expand(len(tokens), -1, -1), lengths > 0)


def small_model(temperature: float) -> SmallModel:
    small = Loads(tiny("llama", seed=5, **SIZE, initializer_range=0.6))
    drafter = SmallModel(ModelParams(model="x", length=2, temperature=temperature), small)
    drafter.bind(TARGET, tokenizer_of())
    return drafter


def now_and_then(drafter: Any) -> Any:
    """Asked in every other round."""
    tree = Backbone(k=2) if isinstance(drafter, Fixed) else SimpleNamespace()
    tree.account = Pauses(False, True)
    drafter.tree = tree
    return drafter


SAMPLING = verifiers.Sampling(None, None)
CHAIN = verifiers.ChainSampling(None, None)
TYPICAL = verifiers.Typical(TypicalParams(), None)
CASES: dict[str, tuple[Drafter, Verifier, float]] = {
    "tree": (Fixed(), SAMPLING, 1.0),
    "fixed chain": (small_model(0.0), SAMPLING, 1.0),
    "sampled chain": (small_model(1.0), CHAIN, 1.0),
    "other temperatures": (small_model(0.7), CHAIN, 1.5),
    "tree now and then": (now_and_then(Fixed()), SAMPLING, 1.0),
    "sampled chain now and then": (now_and_then(small_model(1.0)), CHAIN, 1.0),
    "typical": (Fixed(), TYPICAL, 1.0),
}


@functools.cache
def emitted(case: str) -> tuple[Counter, float]:
    """How often each continuation came, and tau."""
    drafter, verifier, temperature = CASES[case]
    decoder = Decoder(TARGET, drafter, verifier, Sampling(temperature))
    ids = torch.tensor([PROMPT]).expand(ROWS, -1)
    generator = torch.Generator().manual_seed(0)
    counts: Counter = Counter()
    for _ in range(BATCHES):
        rows = decoder.generate(ids, torch.ones_like(ids), Stop(COUNT), generator)
        counts.update(map(tuple, rows))
    return counts, decoder.counter.tau


@pytest.mark.parametrize("case", [case for case in CASES if case != "typical"])
def test_the_loop_is_lossless(case: str) -> None:
    counts, tau = emitted(case)
    assert sum(counts.values()) >= ROWS * BATCHES
    assert tau > (1.1 if "now and then" in case else 1.2)
    assert p_value(counts, exact(temperature=CASES[case][2])) > 1e-3


def test_a_lossy_verifier_is_found_out() -> None:
    assert p_value(emitted("typical")[0], exact(1.0)) < 1e-9


def test_another_temperature_is_found_out() -> None:
    assert p_value(emitted("tree")[0], exact(1.075)) < 1e-9
