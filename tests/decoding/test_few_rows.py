"""The quick products against plain float64 ones, and that nothing of them stays behind."""

import copy

import pytest
import torch
from torch import nn

from kdcore.decoding import few_rows
from kdcore.decoding.few_rows import FewRows
from kdcore.decoding.session import Session

from .targets import tiny


@pytest.fixture(params=[False, True], ids=["widening", "native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor that multiplies bfloat16, or one that does not, whatever this one is."""
    monkeypatch.setattr(few_rows, "_multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 9, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_the_products_are_those_of_the_layer(
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    bias: bool,
    rows: int,
) -> None:
    monkeypatch.setattr(few_rows, "PIECE", 200)  # several pieces, the last one smaller
    torch.manual_seed(0)
    layer = nn.Linear(24, 43, bias=bias).to(dtype)
    states = torch.randn(1, rows, 24).to(dtype)
    with torch.no_grad(), FewRows(layer).at_work(rows):
        found = layer(states)
    expected = nn.functional.linear(
        states.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    assert found.shape == (1, rows, 43) and found.dtype == dtype and found.is_contiguous()
    assert (found.double() - expected).abs().max() < tolerance


def test_one_row_is_computed_as_the_layer_computes_it() -> None:
    torch.manual_seed(0)
    layer, state = nn.Linear(64, 64), torch.randn(1, 1, 64)
    with torch.no_grad(), FewRows(layer).at_work(1):
        assert torch.equal(layer(state), nn.functional.linear(state, layer.weight, layer.bias))
        assert type(layer) is nn.Linear


def test_a_model_is_given_back_as_it_was_even_when_a_pass_fails() -> None:
    model = copy.deepcopy(tiny("llama"))
    kinds = [type(module) for module in model.modules()]
    quick = FewRows(model)
    assert len(quick.swaps) == sum(kind is nn.Linear for kind in kinds)
    with pytest.raises(RuntimeError), quick.at_work(4):
        assert [type(module) for module in model.modules()] != kinds
        raise RuntimeError
    assert [type(module) for module in model.modules()] == kinds


def test_the_prompt_and_one_token_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny("llama"))
    asked = []
    at_work = session.few_rows.at_work
    monkeypatch.setattr(
        session.few_rows, "at_work", lambda rows: asked.append(rows) or at_work(rows)
    )
    session.start(1)
    with torch.no_grad():
        session.extend(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
        session.extend(torch.tensor([[4]]), torch.tensor([1]))
        session.extend(torch.tensor([[5, 6]]), torch.tensor([2]))
    assert asked == [1, 1, 2]


def test_layers_of_another_kind_are_left_alone() -> None:
    class Own(nn.Linear):
        """E.g. a quantised layer."""

    assert FewRows(nn.Sequential(Own(2, 2), nn.Linear(2, 2).to(torch.float16))).swaps == []
