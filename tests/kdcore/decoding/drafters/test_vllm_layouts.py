"""FastEagle and Medusa go to vLLM's folders and come back; the engine's own tests serve them."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.drafters.exchange import export_drafter, import_drafter
from kdcore.decoding.drafters.files import load_drafter, save_drafter
from kdcore.decoding.drafters.layouts import vllm_command
from kdcore.errors import UserError
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.fields import ModelSpec
from tests.tiny.tiny_chat_models import tiny_model
from tests.tiny.trained_drafters import bound

REGISTRY = installed()
ROWS: dict[str, dict[str, Any]] = {
    "fasteagle": {"features": (1, 2, 3)},
    "medusa": {},
    "p_eagle": {"features": (1, 3), "layers": 2, "ffn": 20},
    "dflash": {"features": (1, 2), "layers": 3},
}
CASES = [
    ("fasteagle", {}),
    ("fasteagle", {"vocabulary": 40}),
    ("medusa", {}),
    ("p_eagle", {}),
    ("p_eagle", {"vocabulary": 40}),
    ("dflash", {}),
    ("dflash", {"vocabulary": 40}),
]


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return tiny_model("mistral")  # its embedding is not its head


def folder_of(path: Path, name: str, target: LoadedModel, **params: Any) -> Path:
    given = {"depth": 3, **ROWS[name], **params}
    drafter = bound(name, target.model, **given)
    if "vocabulary" in given:
        drafter.choose_vocabulary(torch.arange(target.classes) % 7)
    made = REGISTRY.component("drafter", name).params(**given)
    save_drafter(path, drafter, Choice("drafter", name, made), target, REGISTRY)
    return path


@pytest.mark.parametrize(("name", "params"), CASES)
def test_what_was_exported_and_imported_is_equal(
    name: str, params: dict, target: LoadedModel, tmp_path: Path
) -> None:
    ours = folder_of(tmp_path / "ours", name, target, **params)
    command = export_drafter(ours, "vllm", tmp_path / "their folder", target, REGISTRY)
    settings = json.loads(shlex.split(command)[-1])
    assert settings["model"] == str(tmp_path / "their folder")
    assert settings["num_speculative_tokens"] == 3
    assert settings.get("parallel_drafting", False) == (name in ("fasteagle", "p_eagle"))
    choice, notes = import_drafter(tmp_path / "their folder", tmp_path / "back", target, REGISTRY)
    assert (choice.name, notes) == (name, ())
    before, after = (load_drafter(tmp_path / n, target, REGISTRY) for n in ("ours", "back"))
    assert before.layers == after.layers and before.depth == after.depth
    weights = after.state_dict()
    assert weights.keys() == before.state_dict().keys()
    assert all(weights[key].equal(value) for key, value in before.state_dict().items())


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("fasteagle", (1, 2, 4)),
        ("fasteagle", (2, 1, 3)),
        ("p_eagle", (1, 1, 2)),
        ("dflash", (1, 4)),
    ],
    ids=["last", "falling", "twice", "last, too"],
)
def test_hidden_states_that_vllm_does_not_give_are_refused(
    name: str, features: tuple, target: LoadedModel, tmp_path: Path
) -> None:
    ours = folder_of(tmp_path / "ours", name, target, features=features)
    with pytest.raises(UserError, match="in rising order and below 4, but the drafter reads"):
        export_drafter(ours, "vllm", tmp_path / "theirs", target, REGISTRY)


def test_an_embedding_that_scales_needs_a_drafter_that_does_not_see_it(tmp_path: Path) -> None:
    gemma = tiny_model("gemma2")
    gemma.model.set_input_embeddings(type("Scaled", (torch.nn.Embedding,), {})(290, 16))
    ours = folder_of(tmp_path / "ours", "fasteagle", gemma)
    export_drafter(ours, "vllm", tmp_path / "theirs", gemma, REGISTRY)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["logit_soft_cap"] == gemma.model.config.final_logit_softcapping
    plain = folder_of(tmp_path / "plain", "fasteagle", gemma, normalise=False)
    with pytest.raises(UserError, match="the embedding of tiny-gemma2 scales its output"):
        export_drafter(plain, "vllm", tmp_path / "other", gemma, REGISTRY)


@pytest.mark.parametrize("name", ["fasteagle", "medusa", "dflash"])
def test_a_bias_of_the_head_is_refused(name: str, tmp_path: Path) -> None:
    biased = tiny_model("mistral")
    biased.model.lm_head.bias = torch.nn.Parameter(torch.zeros(290))
    ours = folder_of(tmp_path / "ours", name, biased)
    with pytest.raises(UserError, match="the head of tiny-mistral has a bias"):
        export_drafter(ours, "vllm", tmp_path / "theirs", biased, REGISTRY)


def test_medusa_with_a_draft_vocabulary_is_refused(target: LoadedModel, tmp_path: Path) -> None:
    ours = folder_of(tmp_path / "ours", "medusa", target, vocabulary=40)
    with pytest.raises(UserError, match="the drafter has one of 40 tokens"):
        export_drafter(ours, "vllm", tmp_path / "theirs", target, REGISTRY)


def test_heads_of_another_target_are_refused(target: LoadedModel, tmp_path: Path) -> None:
    ours = folder_of(tmp_path / "ours", "medusa", target)
    export_drafter(ours, "vllm", tmp_path / "theirs", target, REGISTRY)
    file = tmp_path / "theirs/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, file)
    with pytest.raises(UserError, match="the head of the drafter is not the head of tiny-mistral"):
        import_drafter(tmp_path / "theirs", tmp_path / "back", target, REGISTRY)
    save_file(weights | {"lm_heads.0.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="or a head for each block"):
        import_drafter(tmp_path / "theirs", tmp_path / "back", target, REGISTRY)


@pytest.mark.parametrize("name", ["p_eagle", "dflash"])
def test_published_slots_that_kdcore_does_not_have_are_refused(
    name: str, target: LoadedModel, tmp_path: Path
) -> None:
    ours = folder_of(tmp_path / "ours", name, target, vocabulary=40)
    export_drafter(ours, "vllm", tmp_path / "theirs", target, REGISTRY)
    file = tmp_path / "theirs/model.safetensors"
    weights = load_file(file)
    assert len(weights["embed_tokens.weight"]) == target.classes + 1
    save_file(weights | {"embed_tokens.weight": weights["embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="the drafter has its own embedding"):
        import_drafter(tmp_path / "theirs", tmp_path / "back", target, REGISTRY)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["transformer_layer_config"]["rope_theta"] = 5.0
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the base of RoPE of the drafter is 5.0, but"):
        import_drafter(tmp_path / "theirs", tmp_path / "back", target, REGISTRY)


def test_the_command_names_the_weights_of_a_gguf_target(
    target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine finds a file in a package; kdcore keeps its weights in a folder."""
    read: list[str] = []

    def folder(spec: ModelSpec) -> Path:
        read.append(spec.model)
        return tmp_path / "dequantised"

    monkeypatch.setattr("kdcore.models.folder.files.model_folder", folder)
    names = ["package:some/model.Q4_1.gguf", "here/model.gguf", "owner/name"]
    commands = [
        shlex.split(vllm_command(replace(target, name=name), "medusa", 3)(tmp_path))
        for name in names
    ]
    found = [words[words.index("--model") + 1] for words in commands]
    assert found == [str(tmp_path / "dequantised")] * 2 + ["owner/name"]
    assert read == names[:2]
