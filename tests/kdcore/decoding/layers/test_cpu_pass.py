"""A pass computes what the model does, and nothing of it stays behind."""

import copy
import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from kdcore.decoding.layers import cpu_pass, packed_weights
from kdcore.decoding.layers.cpu_pass import CpuPass
from kdcore.decoding.layers.decoder_layer import DecoderLayer, LayerSize, causal
from kdcore.decoding.session import Session
from tests.tiny.targets import FAMILIES, SIZE, tiny

OF_LLAMA = {"TransformersAttention": 3, "GatedMLP": 3, "RMSNorm": 7, "PackedWeights": 1}
"""Three layers, the last norm and the head."""
PARTS: dict[str, dict[str, int]] = {
    "llama": OF_LLAMA,
    "qwen2": OF_LLAMA,
    "mistral": OF_LLAMA,
    "qwen3": OF_LLAMA,
    # their attention is of classes that are not known: its four matrices by themselves
    "gemma2": {"GatedMLP": 3, "RMSNorm": 13, "PackedWeights": 13},
    "gemma3": {"GatedMLP": 3, "RMSNorm": 19, "PackedWeights": 13},
    "gpt2": {"PackedWeights": 1},
}


def model_of(family: str) -> PreTrainedModel:
    """With norms and biases that are not what they begin as."""
    if family == "qwen3":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZE, head_dim=8)).eval()
    else:
        model = copy.deepcopy(tiny(family))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) / 5
    return model


def kinds(found: CpuPass) -> dict[str, int]:
    return dict(Counter(type(part).__name__ for part in found.parts))


@pytest.mark.parametrize("family", PARTS)
def test_a_pass_computes_what_the_model_does(family: str) -> None:
    model = model_of(family)
    found = CpuPass(model)
    assert kinds(found) == PARTS[family]
    tokens = torch.arange(12).view(2, 6) * 7 % 61
    with torch.no_grad():
        expected = model(tokens).logits
        with found.at_work():
            ours = model(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PARTS)
def test_a_bfloat16_model_computes_in_float32_and_is_given_back(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its float32 copy does, so that a token alone and among others are equal as there."""
    monkeypatch.setattr(packed_weights, "_multiplies_bfloat16", lambda: False)
    model = model_of(family).to(torch.bfloat16)
    single = copy.deepcopy(model).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens, count = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    found = []
    for each in (model, single):
        session = Session(each, layers=(1,))
        with torch.inference_mode():
            session.start(1)
            assert kinds(session.cpu_pass) == PARTS[family]
            found.append(session.extend(tokens, count))
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16 and all(p.requires_grad for p in model.parameters())


def test_a_bfloat16_model_is_left_alone_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_weights, "_multiplies_bfloat16", lambda: True)
    model = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), CpuPass(model).at_work():
        assert model(tokens).logits.dtype == torch.bfloat16


def test_a_drafters_layer_is_computed_in_the_same_way() -> None:
    size = LayerSize(24, 40, 6, 2, 4, 1e-6, 1e4)
    torch.manual_seed(0)
    layer, x = DecoderLayer(size), torch.randn(2, 5, 24)
    rotation = size.rotation(torch.arange(5)[None])
    found = CpuPass(layer)
    assert kinds(found) == {"GroupedAttention": 1, "GatedMLP": 1}
    with torch.no_grad():
        expected = layer(x, rotation, causal)
        with found.at_work():
            ours = layer(x, rotation, causal)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Lookalike(nn.Module):
    """Of the form of a gated MLP."""

    def __init__(self, compute: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj, self.act_fn = nn.Linear(12, 8), nn.SiLU()
        self.compute = compute

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.compute == "two inputs":
            (other,) = more
            up = up + other
        if self.compute == "scaled":
            up = up * 1.01
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(
    ("compute", "parts"),
    [("plain", {"GatedMLP": 1}), ("scaled", {"PackedWeights": 3}), ("two inputs", None)],
)
def test_a_module_of_the_form_that_computes_something_else_is_left_alone(
    compute: str, parts: dict[str, int] | None
) -> None:
    torch.manual_seed(0)
    assert kinds(CpuPass(Lookalike(compute))) == (parts or {"PackedWeights": 3})


def test_a_trial_draws_nothing_from_torchs_own_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    CpuPass(copy.deepcopy(tiny("llama")))
    assert torch.equal(torch.rand(1), expected)


def test_weights_made_in_inference_mode_are_packed() -> None:
    with torch.inference_mode():
        layer, state = nn.Linear(8, 5), torch.randn(2, 8)
        expected = layer(state)
        with CpuPass(layer).at_work():
            assert torch.allclose(layer(state), expected, atol=1e-6)


def test_a_model_is_given_back_as_it_was_even_when_a_pass_fails() -> None:
    model = copy.deepcopy(tiny("llama"))
    found = CpuPass(model)

    def swapped() -> int:
        return sum("forward" in vars(module) for module in model.modules())

    with pytest.raises(RuntimeError), found.at_work():
        assert swapped() == sum(OF_LLAMA.values())
        raise RuntimeError
    assert swapped() == 0


def test_a_module_that_was_given_a_forward_keeps_it() -> None:
    layer = nn.Linear(4, 4)
    found = CpuPass(layer)
    layer.forward = own = lambda x: x
    with found.at_work():
        assert layer.forward is own
    assert layer.forward is own
    assert CpuPass(nn.Sequential(layer)).parts == []


def test_weights_are_packed_once_and_again_when_they_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, pack = [], packed_weights._pack
    monkeypatch.setattr(
        packed_weights, "_pack", lambda weight: packed.append(weight.shape) or pack(weight)
    )
    layer, state = nn.Linear(8, 5, bias=False), torch.randn(2, 8)
    CpuPass(layer)
    CpuPass(layer)
    assert len(packed) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        with CpuPass(layer).at_work():
            assert torch.allclose(layer(state), state @ layer.weight.t(), atol=1e-6)
    assert len(packed) == 2
    layer.weight = nn.Parameter(torch.zeros(5, 8))
    with torch.no_grad(), CpuPass(layer).at_work():
        assert not layer(state).any()


def test_tied_layers_are_packed_once_and_forgotten_with_their_model() -> None:
    gc.collect()
    before = len(packed_weights._packed), len(cpu_pass._copies)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    found = CpuPass(model)
    assert len(found.parts) == 2 and len(packed_weights._packed) == before[0] + 1
    del model, found
    gc.collect()
    assert (len(packed_weights._packed), len(cpu_pass._copies)) == before


def test_a_whole_model_is_forgotten_with_its_copies() -> None:
    model = copy.deepcopy(tiny("llama"))
    gc.collect()
    before = len(cpu_pass._copies)
    CpuPass(model)
    assert len(cpu_pass._copies) == before + 1
    del model
    gc.collect()
    assert len(cpu_pass._copies) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_of_a_session_is_computed_so(family: str) -> None:
    """Then a token's logits are the same whether it is decoded, or verified among others."""
    session = Session(tiny(family))
    with torch.no_grad():
        session.start(1)
        session.extend(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
        assert not any("forward" in vars(module) for module in session.model.modules())
        alone, _ = session.extend(torch.tensor([[4]]), torch.tensor([1]))
        session.rewind(torch.tensor([3]))
        among, _ = session.extend(torch.tensor([[4, 5, 6]]), torch.tensor([1]))
    assert torch.allclose(alone, among, atol=1e-5)
    assert session.cpu_pass.parts


def test_a_model_is_left_alone_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, state = nn.Linear(4, 4), torch.randn(1, 4)
    monkeypatch.setattr(cpu_pass, "SHARE", 0)
    found = CpuPass(layer)
    assert found.parts == []
    with torch.no_grad(), found.at_work():
        assert torch.equal(layer(state), nn.functional.linear(state, layer.weight, layer.bias))
    monkeypatch.undo()
    assert CpuPass(layer).parts, "there is room again"
