"""P-EAGLE and DFlash against their equations, and the attention that both train with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore_baselines.drafters import slots
from kdcore_baselines.drafters.dflash import spread
from kdcore_baselines.drafters.slots import EntriesAndSlots, Keys, SlotsOf
from tests.reference.drafting.slots import dflash, p_eagle
from tests.tiny.targets import FAMILIES, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import batch_of, bound, unbound

REFERENCES = {"p_eagle": p_eagle, "dflash": dflash}
DEPTH = 3


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    ("family", "params"),
    [*((family, {}) for family in FAMILIES), ("llama", {"layers": 1, "features": (2,), "ffn": 20})],
)
def test_forward_is_its_equations(name: str, family: str, params: dict[str, Any]) -> None:
    target = tiny(family)
    drafter = bound(name, target, depth=DEPTH, **{"layers": 2, **params}).double()
    (row,) = prompts(1)
    tokens = batch_of([row]).inputs["input_ids"]
    torch.manual_seed(1)
    features = torch.randn(1, len(row), len(drafter.layers) * 32, dtype=torch.float64)
    with torch.no_grad():
        hidden = drafter(tokens, features)
    embedded = target.get_input_embeddings()(tokens)[0].detach().double()
    expected = REFERENCES[name](
        features[0], embedded, drafter.state_dict(), drafter.layer_size, DEPTH
    )
    assert hidden.shape == (1, len(row), DEPTH, 32)
    # the angles of RoPE are float32
    assert (hidden[0, :-1] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_token_ahead_needs_no_slot() -> None:
    target = tiny("llama")
    drafter = bound("p_eagle", target, depth=1, layers=1)
    (row,) = prompts(1)
    tokens = batch_of([row]).inputs["input_ids"]
    features = torch.randn(1, len(row), 3 * 32)
    deeper = bound("p_eagle", target, depth=2, layers=1)
    assert drafter(tokens, features).shape == (1, len(row), 1, 32)
    assert torch.allclose(drafter(tokens, features), deeper(tokens, features)[:, :, :1])


def given(entries: int, count: int) -> list[Tensor]:
    """Queries, keys and values of entries and of their slots: 4 heads that share 2 key heads."""
    torch.manual_seed(0)
    length = entries * (1 + count)
    return [
        torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]


def by_definition(parts: list[Tensor], entries: int, count: int, ordered: bool) -> Tensor:
    """Attention over all keys at once, under a mask."""
    entry = torch.arange(entries)
    row = torch.cat([entry, entry.repeat_interleave(count)])
    slot = torch.cat([-torch.ones(entries), torch.arange(count).repeat(entries)])
    same = (row[:, None] == row) & (slot[:, None] >= 0) & (slot >= 0)
    if ordered:
        same &= slot[:, None] >= slot
    sees = same | ((slot < 0) & (row[:, None] >= row))
    query, key, value = parts
    key, value = (each.repeat_interleave(2, 1) for each in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees)


@pytest.mark.parametrize("scores", [1, 40, 1 << 20])
@pytest.mark.parametrize("ordered", [True, False])
def test_its_attention_and_gradients_are_those_under_a_mask(
    ordered: bool, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of one row, of several, and of all."""
    monkeypatch.setattr(slots, "SCORES", scores)
    parts, entries, count = given(7, 3), 7, 3
    expected = by_definition(parts, entries, count, ordered)
    if ordered:
        read = EntriesAndSlots(entries)(*parts)
    else:
        known = Keys(*(each[:, :, :entries] for each in parts[1:]))
        own = (each[:, :, entries:] for each in parts)
        read = SlotsOf(known, ordered=False)(*own)
        expected = expected[:, :, entries:]
    assert torch.allclose(read, expected, rtol=1e-12)
    toward = torch.randn_like(read)
    for ours, theirs in zip(
        torch.autograd.grad(read, parts, toward, retain_graph=True, allow_unused=True),
        torch.autograd.grad(expected, parts, toward),
        strict=True,
    ):
        assert ours is not None
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_slot_begins_as_the_mean_of_the_embeddings() -> None:
    target = tiny("llama")
    mean = target.get_input_embeddings().weight.detach().mean(0)
    for name in REFERENCES:
        drafter = unbound(name)
        drafter.bind(target, tokenizer_of())
        assert torch.allclose(drafter.mask_token, mean)


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [
        (36, 5, (2, 10, 18, 26, 34)),
        (28, 5, (2, 8, 14, 20, 26)),
        (30, 1, (16,)),
        (3, 5, (2,)),
        (1, 2, (1,)),
    ],
)
def test_it_reads_states_at_equal_distances(
    depth: int, count: int, expected: tuple[int, ...]
) -> None:
    """36 and 28 layers: of the published drafters, whose indices begin at the first layer."""
    assert spread(depth, count) == expected
