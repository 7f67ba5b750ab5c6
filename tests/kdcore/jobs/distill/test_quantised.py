"""Quantised models: what they compute, what they weigh, and adapters trained on them (QLoRA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcore.decoding.trials.tree_probe import refuse_unfaithful
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.loading.adapters import merged, with_adapters
from kdcore.models.loading.load import load_model
from kdcore.specs.distill import DistillSpec, LoraSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.fixtures.json_lines import write_lines
from tests.kdcore.models.loading.test_adapters import randomised
from tests.kdcore.models.loading.test_loading import IDS, logits
from tests.tiny.tiny_chat_models import WIDE, saved, tiny_model

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The 16 numbers of NF4 (QLoRA, arXiv 2305.14314, appendix E)."""
BLOCK = 64


def rounded(weight: Tensor) -> Tensor:
    """A weight as NF4 rounds it, in float64: the nearest level, times the largest of its block."""
    blocks = weight.double().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


def rounded_model(folder: Path) -> Any:
    """The model of a folder with the weights that NF4 makes of those of its layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data = rounded(weight.detach().float())
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quantised")
    saved(tiny_model(**WIDE), home / "teacher")
    saved(tiny_model(seed=1, **WIDE), home / "student")
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher {n}"} for n in range(4)]
    write_lines(home / "rows.jsonl", rows)
    return home


def spec(home: Path, **student: Any) -> DistillSpec:
    source = {"name": "chat", "path": str(home / "rows.jsonl")}
    asked = {
        "run": str(home / "run"),
        "teacher": {"model": str(home / "teacher"), "quantization": NF4},
        "student": {"model": str(home / "student"), "lora": {"r": 2}, **student},
        "data": {"train": source, "heldout": source},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        "evaluation": {"before": False, "samples": 0},
    }
    return DistillSpec.model_validate(asked)


def test_a_quantised_model_computes_with_rounded_weights(home: Path) -> None:
    loaded = load_model(ModelSpec(model=str(home / "teacher"), quantization=NF4))
    right = logits(rounded_model(home / "teacher")).float()
    torch.testing.assert_close(logits(loaded.model), right, rtol=1e-3, atol=1e-3)
    plain = load_model(ModelSpec(model=str(home / "teacher")))
    assert not torch.allclose(logits(plain.model), right, atol=0.1)
    assert loaded.digest != plain.digest == loaded.files


@pytest.mark.parametrize("packs", [True, False])
def test_adapters_get_their_gradients_on_every_processor(
    home: Path, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """Where bfloat16 is multiplied, bitsandbytes packs weights for a kernel without a backward."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: packs)
    loaded = load_model(ModelSpec(model=str(home / "student"), quantization=NF4))
    plain = AutoModelForCausalLM.from_pretrained(home / "student")
    for name, weight in plain.named_parameters():
        if name.endswith("proj.weight"):
            weight.data = rounded(weight.detach()).float()
    found = []
    for model in (loaded.model, plain):
        logits(model.eval())  # as a measurement before the training
        torch.manual_seed(0)
        adapted = randomised(with_adapters(model.requires_grad_(False), LoraSpec(r=2))).train()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


def test_its_memory_is_known_without_weights(home: Path) -> None:
    loaded = load_model(ModelSpec(model=str(home / "teacher"), quantization=NF4))
    outline = load_model(ModelSpec(model=str(home / "teacher"), quantization=NF4), weights=False)
    assert outline.weight_bytes == loaded.weight_bytes
    found = preflight(spec(home, quantization=NF4)).memory
    plain = preflight(spec(home)).memory
    assert found["teacher"] == outline.weight_bytes
    assert plain["student"] - found["student"] == pytest.approx(
        sum(3.5 * p.numel() for n, p in tiny_model(**WIDE).model.named_parameters() if "proj" in n)
    )


def test_adapters_are_merged_into_weights_in_full(home: Path) -> None:
    loaded = load_model(ModelSpec(model=str(home / "student"), quantization=NF4))
    adapted = randomised(with_adapters(loaded.model, LoraSpec(r=2)))
    right = logits(adapted)
    made = merged(adapted)
    torch.testing.assert_close(logits(made), right, rtol=1e-3, atol=1e-3)
    assert not hasattr(made.config, "quantization_config")


def test_a_quantised_student_is_distilled_from_a_quantised_teacher(home: Path) -> None:
    run = distill(spec(home, quantization=NF4))
    assert run.finished
    again = AutoModelForCausalLM.from_pretrained(run.path("model"))
    base = rounded_model(home / "student").float()
    before = logits(base)
    right = peft.PeftModel.from_pretrained(base, run.path("adapter"))
    torch.testing.assert_close(logits(again), logits(right), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(again), before, atol=1e-3)


def test_eight_bits_with_outliers(home: Path) -> None:
    """The int8 kernels leave out outlying columns, by all tokens of a pass: later ones count."""
    outlying = tiny_model()
    for layer in outlying.model.model.layers:
        layer.input_layernorm.weight.data[::5] *= 9
    saved(outlying, home / "outlying")
    int8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    spec = ModelSpec(model=str(home / "outlying"), quantization=int8)
    loaded = load_model(spec).model.eval()  # passes the check that it is causal
    with pytest.raises(UserError, match=r"llm_int8_threshold: 0\.0"):
        refuse_unfaithful(loaded)
    spec = spec.model_copy(update={"quantization": int8 | {"llm_int8_threshold": 0.0}})
    refuse_unfaithful(load_model(spec).model.eval())
