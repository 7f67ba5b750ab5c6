"""Packed products against plain float64 ones, and that nothing of them stays behind."""

import copy
import gc

import pytest
import torch
from torch import nn

from kdcore.decoding import packed_linears
from kdcore.decoding.packed_linears import PackedLinears
from kdcore.decoding.session import Session

from .targets import FAMILIES, tiny


@pytest.fixture(params=[False, True], ids=["widening", "native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor that multiplies bfloat16, or one that does not, whatever this one is."""
    monkeypatch.setattr(packed_linears, "_multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_the_products_are_those_of_the_layer(
    native: bool, dtype: torch.dtype, tolerance: float, bias: bool, rows: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 43, bias=bias).to(dtype)
    states = torch.randn(1, rows, 24).to(dtype)
    with torch.no_grad(), PackedLinears(layer).at_work():
        found = layer(states)
    expected = nn.functional.linear(
        states.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    assert found.shape == (1, rows, 43) and found.dtype == dtype and found.is_contiguous()
    assert (found.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(43, 24), (96, 64), (512, 200)])
def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(packed_linears, "_multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    with torch.no_grad():  # a power of 2 too many for half precision, and a weight of 0
        layer.weight[0] *= 2.0**18
        layer.weight[1, 1] = 0
    layer.weight.data = _with_few_digits(layer.weight.data)
    states = torch.randn(1, 40, shape[1]).to(dtype)
    with torch.no_grad(), PackedLinears(layer).at_work():
        alone = torch.cat([layer(states[:, row : row + 1]) for row in range(40)], dim=1)
        for rows in (2, 7, 8, 17, 40):
            assert torch.equal(layer(states[:, :rows]), alone[:, :rows])


def _with_few_digits(weight: torch.Tensor) -> torch.Tensor:
    """The smallest weights as 0, so that all of them fit into half precision at one scale."""
    return torch.where(weight.abs() < weight.abs().max() * 2.0**-30, 0.0, weight)


@pytest.mark.parametrize(
    ("smallest", "packing"), [(2.0**-20, packed_linears._Half), (2.0**-60, packed_linears._Single)]
)
def test_bfloat16_weights_are_halved_where_that_is_exact(smallest: float, packing: type) -> None:
    weight = torch.tensor([[3.0, -1.0078125, 0.0, smallest * 1.0078125]], dtype=torch.bfloat16)
    made = packed_linears._pack(weight)
    assert type(made) is packing
    layer = nn.Linear(4, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    assert torch.equal(made(torch.eye(4), layer), weight.float().t())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_model_computes_in_float32_and_is_given_back(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its float32 copy does, so that a token alone and among others are equal as there."""
    monkeypatch.setattr(packed_linears, "_multiplies_bfloat16", lambda: False)
    model = copy.deepcopy(tiny(family)).to(torch.bfloat16)
    single = copy.deepcopy(model).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens, count = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    found = []
    for each in (model, single):
        session = Session(each, layers=(1,))
        with torch.inference_mode():
            session.start(1)
            found.append(session.extend(tokens, count))
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16 and all(p.requires_grad for p in model.parameters())


def test_a_bfloat16_model_is_left_alone_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_linears, "_multiplies_bfloat16", lambda: True)
    linears = PackedLinears(copy.deepcopy(tiny("llama")).to(torch.bfloat16))
    assert (linears.layers, linears.others) == ([], [])


def test_weights_made_in_inference_mode_are_packed() -> None:
    with torch.inference_mode():
        layer, state = nn.Linear(8, 5), torch.randn(2, 8)
        expected = layer(state)
        with PackedLinears(layer).at_work():
            assert torch.allclose(layer(state), expected, atol=1e-6)


def test_a_model_is_given_back_as_it_was_even_when_a_pass_fails() -> None:
    model = copy.deepcopy(tiny("llama"))
    kinds = [type(module) for module in model.modules()]
    linears = PackedLinears(model)
    assert len(linears.layers) == sum(kind is nn.Linear for kind in kinds)
    with pytest.raises(RuntimeError), linears.at_work():
        assert [type(module) for module in model.modules()] != kinds
        raise RuntimeError
    assert [type(module) for module in model.modules()] == kinds


def test_weights_are_packed_once_and_again_when_they_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, pack = [], packed_linears._pack
    monkeypatch.setattr(
        packed_linears, "_pack", lambda weight: packed.append(weight.shape) or pack(weight)
    )
    layer, state = nn.Linear(8, 5, bias=False), torch.randn(2, 8)
    PackedLinears(layer)
    PackedLinears(layer)
    assert len(packed) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        with PackedLinears(layer).at_work():
            assert torch.allclose(layer(state), state @ layer.weight.t(), atol=1e-6)
    assert len(packed) == 2


def test_tied_layers_are_packed_once_and_forgotten_with_their_model() -> None:
    gc.collect()
    before = len(packed_linears._packed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    linears = PackedLinears(model)
    assert len(linears.layers) == 2 and len(packed_linears._packed) == before + 1
    del model, linears
    gc.collect()
    assert len(packed_linears._packed) == before


def test_every_pass_of_a_session_is_computed_from_packed_weights() -> None:
    """Then a token's logits are the same whether it is decoded, or verified among others."""
    session = Session(tiny("llama"))
    with torch.no_grad():
        session.start(1)
        session.extend(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
        assert all(type(module) is not packed_linears._Packed for module in session.model.modules())
        alone, _ = session.extend(torch.tensor([[4]]), torch.tensor([1]))
        session.rewind(torch.tensor([3]))
        among, _ = session.extend(torch.tensor([[4, 5, 6]]), torch.tensor([1]))
    assert torch.allclose(alone, among, atol=1e-6)
    assert len(session.linears.layers) > 0


def test_what_cannot_or_need_not_be_packed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        """E.g. a quantised layer."""

    assert PackedLinears(nn.Sequential(Own(2, 2), nn.Linear(2, 2).half())).layers == []
    monkeypatch.setattr(packed_linears, "SHARE", 0)
    layer, state = nn.Linear(4, 4), torch.randn(1, 4)
    linears = PackedLinears(layer)
    assert linears.layers == []  # there is no room for a copy
    with torch.no_grad(), linears.at_work():
        assert torch.equal(layer(state), nn.functional.linear(state, layer.weight, layer.bias))
