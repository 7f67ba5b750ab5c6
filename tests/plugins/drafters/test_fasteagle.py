"""FastEagle against its equations."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kdcore.components.registry import installed
from kdcore.decoding.layers.decoder_layer import causal
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.training import MethodSpec
from kdcore.specs.reading import plain_yaml
from kdcore.training.method import build_objective
from kdcore_fasteagle.drafter import _size_of_high
from kdcore_fasteagle.plugin import FastEagleParams
from tests.reference.drafting import decoder_layer as reference
from tests.tiny.targets import FAMILIES, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import batch_of, bound, decode, unbound


def test_declaring_it_needs_no_torch() -> None:
    check = (
        "import sys, kdcore_fasteagle.plugin as p; [*p.kdcore_components()]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()


@pytest.mark.parametrize(
    ("family", "normalise", "norms"),
    [
        *((family, normalise, "each") for family in FAMILIES for normalise in (True, False)),
        ("llama", True, "one"),
        ("llama", False, "none"),
    ],
)
def test_forward_is_the_cascade_of_its_equations(family: str, normalise: bool, norms: str) -> None:
    target = tiny(family)
    drafter = bound("fasteagle", target, depth=3, ffn=20, normalise=normalise, norms=norms).double()
    (row,) = prompts(1)
    tokens = batch_of([row]).inputs["input_ids"]
    features = torch.randn(1, len(row), 3 * 32, dtype=torch.float64)
    with torch.no_grad():
        hidden = drafter(tokens, features)
    embedded = target.get_input_embeddings()(tokens)[0, 1:].detach().double()
    expected = reference.fasteagle(
        features[0, :-1], embedded, drafter.state_dict(), drafter.layer_size, normalise
    )
    assert hidden.shape == (1, len(row), 3, 32)
    # the angles of RoPE are float32
    assert (hidden[0, :-1] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("norms", "count"), [("each", 3), ("one", 1), ("none", 0)])
def test_its_norms_are_trained_and_it_decodes_with_any_number(norms: str, count: int) -> None:
    target = tiny("llama")
    drafter = bound("fasteagle", target, depth=3, norms=norms)
    trained = dict(drafter.named_parameters())
    assert len(trained["norms"]) == count if count else "norms" not in trained
    again = unbound("fasteagle", depth=3, norms=norms)
    again.bind(target, tokenizer_of())
    again.load_state_dict(drafter.state_dict())
    rows = prompts(2)
    assert decode(again.eval(), target, rows, 8) == decode(unbound("nothing"), target, rows, 8)


def test_the_loss_can_supervise_the_last_level_alone() -> None:
    (docs,) = re.findall(
        r"```yaml\n(method:\n  gates: \[\].*?)```",
        (Path(__file__).parents[3] / "docs/methods/drafters.md").read_text(),
        re.DOTALL,
    )
    data, _ = plain_yaml.parse(docs, str)
    spec = MethodSpec.model_validate(data["method"])
    assert build_objective(spec, Assembly(installed())).weights == {"kd_7": 1.0}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (7, (2, 3, 4)), (30, (2, 15, 27))],
)
def test_it_reads_low_middle_and_high(layers: int, expected: tuple[int, ...]) -> None:
    target = tiny("mistral", num_hidden_layers=layers)
    assert bound("fasteagle", target, depth=1).layers == expected


@pytest.mark.parametrize("features", [(1, 2, 3), (3, 1, 2), (1, 3, 2)])
def test_its_stream_begins_as_the_highest_state_wherever_that_stands(
    features: tuple[int, ...],
) -> None:
    target = tiny("mistral", num_hidden_layers=4)
    drafter = unbound("fasteagle", depth=2, features=features, normalise=False)
    drafter.bind(target, tokenizer_of())
    shares = [part.diagonal().mean() for part in drafter.fuse_features.weight.chunk(3, dim=1)]
    heard = []
    block = target.get_decoder().layers[3]
    with block.register_forward_pre_hook(lambda _, args: heard.append(args[0][0])):
        target(input_ids=(torch.arange(32) * 997 % target.config.vocab_size)[None])
    size = heard[0].detach().square().mean(-1).sqrt().median()
    assert max(range(3), key=shares.__getitem__) == features.index(3)
    assert float(_size_of_high(target, features)) == pytest.approx(float(size))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_norms_begin_as_a_share_of_the_targets_final_norm(family: str) -> None:
    target = tiny(family, seed=2)
    norm = [part for part in target.get_decoder().children() if "Norm" in type(part).__name__][-1]
    scale = torch.linspace(0.5, 2, 32)
    was = norm.weight.detach().clone()
    norm.weight.data.copy_(scale - 1 if family.startswith("gemma") else scale)
    drafter = unbound("fasteagle", depth=2)
    drafter.bind(target, tokenizer_of())
    norm.weight.data.copy_(was)
    assert torch.allclose(drafter.norms, 0.3 * scale.expand(2, -1), atol=1e-4)


def test_its_levels_can_begin_as_the_last_layers() -> None:
    target = tiny("llama")
    drafter = unbound("fasteagle", depth=4, init="target")
    drafter.bind(target, tokenizer_of())
    for level, place in zip(drafter.levels, [0, 0, 1, 2], strict=True):
        own, theirs = level.state_dict(), target.model.layers[place].state_dict()
        assert own.keys() == theirs.keys()
        assert all(own[name].equal(theirs[name]) for name in own)
    # and are the same function, rotation and norms included
    size, ids = drafter.layer_size, torch.tensor(prompts(1))
    positions = torch.arange(ids.shape[1])[None]
    hidden = target(ids, output_hidden_states=True).hidden_states
    ours = drafter.levels[2](hidden[1], size.rotation(positions), causal)
    assert torch.allclose(ours, hidden[2], atol=1e-4)


def test_a_target_of_few_positions_is_probed_by_as_many_tokens() -> None:
    size = _size_of_high(tiny("gpt2", n_positions=8), (1, 2))
    assert size.isfinite() and size > 0


@pytest.mark.parametrize("init", ["new", "target"])
def test_the_first_level_begins_with_the_high_state_and_the_token(init: str) -> None:
    target = tiny("llama")
    drafter = unbound("fasteagle", depth=2, init=init)
    drafter.bind(target, tokenizer_of())
    seen: list[torch.Tensor] = []
    drafter.levels[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = torch.tensor(prompts(1))
    hidden = target(ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        drafter(ids, torch.cat([hidden[layer] for layer in drafter.layers], dim=-1))
        scaled = [F.rms_norm(each, (32,)) for each in (hidden[3], drafter.embed(ids.roll(-1, 1)))]
    expected = scaled[0] + scaled[1] / 2
    assert F.cosine_similarity(seen[0], expected, dim=-1).mean() > 0.7
    size = hidden[3].square().mean(-1).sqrt().median() if init == "target" else torch.tensor(1.0)
    assert 0.7 < seen[0].square().mean().sqrt() / size < 1.8


@pytest.mark.parametrize(
    ("family", "params"), [("gpt2", {}), ("gemma2", {}), ("qwen2", {}), ("llama", {"ffn": 20})]
)
def test_layers_of_another_make_are_refused_as_a_beginning(family: str, params: dict) -> None:
    with pytest.raises(UserError, match="init: new"):
        unbound("fasteagle", init="target", **params).bind(tiny(family), tokenizer_of())


def test_hidden_states_that_the_target_lacks_are_refused() -> None:
    drafter = unbound("fasteagle", features=(0, 9))
    with pytest.raises(UserError, match="hidden state 9"):
        drafter.bind(tiny("llama"), tokenizer_of())
    with pytest.raises(ValidationError):
        FastEagleParams(features=())
