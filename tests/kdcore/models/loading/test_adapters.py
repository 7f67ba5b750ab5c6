"""Adapters: what they may target, and that a merged model computes what the adapted one did."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig

from kdcore.errors import UserError
from kdcore.models.loading.adapters import merged, merged_with, with_adapters, with_saved_adapter
from kdcore.specs.distill import LoraSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.kdcore.models.loading.test_loading import logits
from tests.tiny.tiny_chat_models import tiny_model


def randomised(model: Any) -> Any:
    """The adapted model with adapters that change its logits, as if trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("ends", [["head"], ["embeddings"], ["head", "embeddings"], []], ids=str)
def test_a_merged_model_is_the_adapted_one(family: str, ends: list[str], tmp_path: Path) -> None:
    """Also where head and embeddings share their weights, as in the first two families."""
    plain: Any = tiny_model(family).model
    names = {"head": "lm_head", "embeddings": "wte" if family == "gpt2" else "embed_tokens"}
    asked = LoraSpec(r=2, targets=[names[end] for end in ends] or "all-linear")
    adapted = randomised(with_adapters(copy.deepcopy(plain), asked))
    right = logits(adapted)
    assert not torch.allclose(right, logits(plain), atol=1e-2)
    gathered = {name: each.clone() for name, each in adapted.state_dict().items()}
    of_pieces = merged_with(adapted, gathered)
    made = merged(adapted)
    assert of_pieces.config == made.config
    kept = of_pieces.state_dict()
    assert kept.keys() == made.state_dict().keys()
    assert all(torch.equal(each, kept[name]) for name, each in made.state_dict().items())
    torch.testing.assert_close(logits(made), right, rtol=1e-4, atol=1e-4)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), right, rtol=1e-4, atol=1e-4)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (family != "mistral" and not ends)  # and no larger than it must be


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1),
        FalconMambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1),
        Mamba2Config(
            vocab_size=61, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8,
            n_groups=1, state_size=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_all_linear_means_all_that_can_be_adapted(config: Any) -> None:
    model = with_adapters(AutoModelForCausalLM.from_config(config), LoraSpec(r=2))
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any(".in_proj." in name for name in names)
    assert not any(".out_proj." in name for name in names)


@pytest.mark.parametrize(("targets", "cause"), [(["out_proj"], "incompatible"), (["no"], "no")])
def test_targets_that_do_not_fit(targets: list[str], cause: str) -> None:
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(UserError, match=f"do not fit MambaForCausalLM: .*{cause}") as caught:
        with_adapters(AutoModelForCausalLM.from_config(config), LoraSpec(targets=targets))
    assert "in_proj" in caught.value.cure and "out_proj" not in caught.value.cure


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"r": 4},
            r"lora_A.weight has the shape \[2, .*, and adapter_config.json makes it .* r: 4",
        ),
        ({"target_modules": ["q_proj"]}, "adapter_config.json does not make .*down_proj.lora_A"),
        ({"target_modules": ["q_proj", "k_proj", "lm_head"]}, "does not make .*down_proj.lora_A"),
    ],
)
def test_a_saved_adapter_that_its_config_does_not_describe_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    """peft drops weights that its config does not name, and trains others anew."""
    model = tiny_model().model
    targets = ["q_proj", "down_proj"]
    with_adapters(model, LoraSpec(r=2, targets=targets)).save_pretrained(tmp_path)
    spec = ModelSpec.model_validate({"model": "tiny", "adapter": str(tmp_path)})
    with_saved_adapter(tiny_model().model, tmp_path, spec)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=f"adapter .* does not fit tiny: .*{said}"):
        with_saved_adapter(tiny_model().model, tmp_path, spec)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": [*targets, "k_proj"]})
    )
    with pytest.raises(UserError, match=r"makes, and it lacks, .*k_proj\.lora_A"):
        with_saved_adapter(tiny_model().model, tmp_path, spec)
