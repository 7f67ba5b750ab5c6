"""Packed products against plain float64 ones."""

import pytest
import torch
from torch import nn

from kdcore.decoding.layers import packed_weights
from kdcore.decoding.layers.packed_weights import PackedWeights, is_plain


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 9, 33])
@pytest.mark.parametrize("bias", ["none", "first", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_products_are_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, bias: str, rows: int
) -> None:
    monkeypatch.setattr(packed_weights, "_multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    layers = [
        nn.Linear(24, 43, bias=bias != "none").to(dtype),
        nn.Linear(24, 7, bias=bias == "all").to(dtype),
    ]
    assert all(map(is_plain, layers))
    states = torch.randn(1, rows, 24).to(dtype)
    for some in (layers, layers[:1]):
        with torch.no_grad():
            found = PackedWeights.of(*some)(states)
        expected = torch.cat(
            [
                nn.functional.linear(
                    states.double(),
                    layer.weight.double(),
                    None if layer.bias is None else layer.bias.double(),
                )
                for layer in some
            ],
            dim=-1,
        )
        assert found.shape == expected.shape and found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(43, 24), (96, 64), (512, 200)])
def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(packed_weights, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(packed_weights, "SHARED", 5000)  # of the three shapes, the last two
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    with torch.no_grad():  # a power of 2 too many for half precision, and a weight of 0
        layer.weight[0] *= 2.0**18
        layer.weight[1, 1] = 0
    layer.weight.data = _with_few_digits(layer.weight.data)
    states = torch.randn(1, 40, shape[1]).to(dtype)
    with torch.no_grad():
        product = PackedWeights.of(layer)
        alone = torch.cat([product(states[:, row : row + 1]) for row in range(40)], dim=1)
        for rows in (2, 7, 8, 17, 40):
            assert torch.equal(product(states[:, :rows]), alone[:, :rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_share_a_product_change_no_bit_of_it(threads: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 200).half().float()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        by_one = packed_weights._by_one_thread(weight)
        by_all = packed_weights._by_all_threads(weight)
        for count in (3, 6, 27):
            rows = torch.randn(count, 200)
            assert torch.equal(by_one(rows), by_all(rows))
    finally:
        torch.set_num_threads(before)


def _with_few_digits(weight: torch.Tensor) -> torch.Tensor:
    """The smallest weights as 0, so that all of them fit into half precision at one scale."""
    return torch.where(weight.abs() < weight.abs().max() * 2.0**-30, 0.0, weight)


@pytest.mark.parametrize(
    ("smallest", "packing"), [(2.0**-20, packed_weights._Half), (2.0**-60, packed_weights._Single)]
)
def test_bfloat16_weights_are_halved_where_that_is_exact(smallest: float, packing: type) -> None:
    weight = torch.tensor([[3.0, -1.0078125, 0.0, smallest * 1.0078125]], dtype=torch.bfloat16)
    made = packed_weights._pack(weight)
    assert type(made) is packing
    assert torch.equal(made(torch.eye(4), None), weight.float().t())


def test_what_cannot_or_need_not_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        """E.g. a quantised layer."""

    heard, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    heard.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    others = [Own(2, 2), nn.Linear(2, 2).half(), nn.Linear(2, 2).double(), heard, patched]
    assert not any(map(is_plain, others)) and is_plain(nn.Linear(2, 2))
    for native in (True, False):
        monkeypatch.setattr(packed_weights, "_multiplies_bfloat16", lambda native=native: native)
        assert is_plain(nn.Linear(2, 2).to(torch.bfloat16)) is not native
