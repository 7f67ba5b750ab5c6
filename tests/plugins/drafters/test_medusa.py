"""Medusa against its equation."""

import torch

from tests.tiny.targets import tiny, tokenizer_of
from tests.tiny.trained_drafters import bound, unbound


def test_its_heads_begin_as_the_targets_own() -> None:
    drafter = unbound("medusa")
    drafter.bind(tiny("llama"), tokenizer_of())
    final = torch.randn(2, 5, 32)
    assert drafter(torch.zeros(2, 5).long(), final).equal(final[:, :, None].expand(-1, -1, 4, -1))


def test_a_head_is_its_equation() -> None:
    drafter = bound("medusa", tiny("llama"), depth=3).double()
    final = torch.randn(1, 5, 32, dtype=torch.float64)
    hidden = drafter(torch.zeros(1, 5).long(), final)
    weights, biases = drafter.heads.weight.view(3, 32, 32), drafter.heads.bias.view(3, 32)
    for level in range(3):
        inner = final @ weights[level].T + biases[level]
        expected = final + inner * inner.sigmoid()
        assert torch.allclose(hidden[:, :, level], expected, rtol=1e-12)
