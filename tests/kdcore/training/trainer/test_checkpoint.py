"""A checkpoint's state comes back as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcore.training.trainer import checkpoint as checkpoint_state


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_generators_go_on_where_they_were(tmp_path: Path) -> None:
    checkpoint_state.write_randomness(tmp_path / "randomness")
    expected = drawn()
    drawn()
    checkpoint_state.read_randomness(tmp_path / "randomness")
    assert drawn() == expected


def test_the_generator_of_apple_s_gpu_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(checkpoint_state, "default_device", lambda: torch.device("mps"))
    monkeypatch.setattr("torch.mps.device_count", lambda: 1)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: states[0])
    monkeypatch.setattr("torch.mps.set_rng_state", states.append)
    checkpoint_state.write_randomness(tmp_path / "randomness")
    checkpoint_state.read_randomness(tmp_path / "randomness")
    before, after = states
    assert torch.equal(before, after)


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    def stepped(optimizer: torch.optim.Optimizer, weight: torch.Tensor, step: int) -> None:
        weight.grad = torch.full_like(weight, 0.1 * step)
        optimizer.step()

    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1 / 3, betas=(0.8, 0.99))
    stepped(optimizer, weight, 1)
    checkpoint_state.write_optimizer(tmp_path / "optimizer", optimizer)
    copy = weight.detach().clone().requires_grad_()
    other = torch.optim.AdamW([copy], lr=1.0)
    checkpoint_state.read_optimizer(tmp_path / "optimizer", other)
    stepped(optimizer, weight, 2)
    stepped(other, copy, 2)
    assert torch.equal(weight, copy)


def test_an_empty_state_is_a_state(tmp_path: Path) -> None:
    checkpoint_state.write(tmp_path / "state", {})
    assert checkpoint_state.read(tmp_path / "state") == ({}, None)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_model_comes_back_whatever_its_weights_are_called_on_disk(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **PUBLISHED[family])
    trained, other = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
    trained.save_pretrained(tmp_path)
    renamed = checkpoint_state.has_other_names(tmp_path, other)
    assert renamed == (family not in ("llama", "gemma3_text"))
    checkpoint_state.read_converted(tmp_path, other)
    loaded = other.state_dict()
    assert all(torch.equal(loaded[n], each) for n, each in trained.state_dict().items())
