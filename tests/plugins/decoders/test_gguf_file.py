"""The written GGUF file is the target: transformers reads it back to the same logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.transformers_versions import dequantized
from kdcore.specs.bench import BenchSpec
from kdcore_baselines.decoders.gguf_file import write_gguf
from kdcore_baselines.decoders.llama_cpp import _written

FULL: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


def target(family: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 1e-4,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(family, **(sizes | FULL.get(family, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("family", FULL)
def test_transformers_reads_the_same_model(tmp_path: Path, family: str) -> None:
    own = target(family)
    write_gguf(own, "float32", tmp_path / "own.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="own.gguf", dtype=torch.float32, **dequantized()
    ).eval()
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")]
)
def test_matrices_have_the_dtype_and_norms_keep_theirs(
    tmp_path: Path, weights: str, kind: str
) -> None:
    write_gguf(target("llama"), weights, tmp_path / "own.gguf")
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "own.gguf").tensors
    }
    assert {kinds.pop(name) for name in [*kinds] if "norm" in name or "bias" in name} == {"F32"}
    assert set(kinds.values()) == {kind}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "it is not one of llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 8}, "its layers have a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "its rotary positions are linear",
        ),
    ],
)
def test_what_the_file_would_not_say_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as refusal:
        write_gguf(target(family, **changes), "float32", tmp_path / "own.gguf")
    assert "set gguf of the baseline llama_cpp" in refusal.value.cure


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    odd = target("llama")
    odd.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra\.weight has no place"):
        write_gguf(odd, "float32", tmp_path / "own.gguf")


def test_the_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path))
    loaded = LoadedModel(target("llama"), None, "tiny", "digest")
    path = _written(loaded, "float16")
    first = path.stat().st_mtime_ns
    assert _written(loaded, "float16") == path and path.stat().st_mtime_ns == first
    assert _written(loaded, "float32") != path


def test_without_the_package_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    spec = BenchSpec.model_validate(
        {
            "job": "bench",
            "target": {"model": "any"},
            "baselines": ["llama_cpp"],
            "sets": {"a": {"name": "chat", "path": "a.jsonl"}},
        }
    )
    with pytest.raises(UserError, match="llama-cpp-python is not installed") as refusal:
        Assembly(installed()).build(spec.baselines["llama_cpp"])
    assert refusal.value.cure == "pip install 'kdcore[llama-cpp]'"
