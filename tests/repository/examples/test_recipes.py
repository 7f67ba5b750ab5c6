"""Each recipe resolves as `kdcore check` does: models of the real sizes, without weights.

The hub is a folder of the same names here, with configs and a small tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, Features
from transformers import (
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    ResNetConfig,
)

from kdcore.jobs.preflight import estimates, train_drafter
from kdcore.models.loading import load as loading
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.fixtures.pages import ROOT
from tests.tiny.tiny_chat_models import OTHER_TEXT, tiny_tokenizer

FOLDER = ROOT / "examples/recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
INTENTS = [f"intent {n:02}" for n in range(77)]
FINE = [f"thing {n:02}" for n in range(100)]
TEACHER = "runs/recipes/banking77-teacher/model"
"""The model that deepkd_banking77_teacher.yaml trains, and deepkd_banking77.yaml reads."""
IMAGE_TEACHER = "runs/recipes/cifar100-teacher/model"
"""Likewise for CIFAR-100."""
GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, **GROUPED}

CONFIGS: dict[str, PreTrainedConfig] = {
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(vocab_size=128256, **LARGE),
    "mistralai/Mistral-7B-Instruct-v0.2": MistralConfig(vocab_size=32000, **LARGE),
    "Qwen/Qwen2-7B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen/Qwen2-1.5B-Instruct": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Qwen/Qwen3-1.7B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    ),
    "google-bert/bert-base-uncased": BertConfig(),
    TEACHER: BertConfig(
        id2label=dict(enumerate(INTENTS)), architectures=["BertForSequenceClassification"]
    ),
    IMAGE_TEACHER: ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[9, 9, 9],
        layer_type="basic",
        id2label=dict(enumerate(FINE)),
        architectures=["ResNetForImageClassification"],
    ),
}


def project(folder: Path, place: Path) -> None:
    """Write the recipes, the data and the models that one of them names into a folder."""
    recipe = (ROOT / place).read_text()
    recipes, intents = (folder / place).parent, folder / "public/intent"
    shutil.copytree(FOLDER, folder / "examples/recipes")
    (recipes / "data").mkdir()
    said = [{"from": "human", "value": "the mat?"}, {"from": "gpt", "value": "sat"}]
    rows = json.dumps({"conversations": said}) + "\n"
    (recipes / "data/sharegpt.jsonl").write_text(rows * 4)
    turns = [{"role": "user", "content": "the mat?"}, {"role": "assistant", "content": "sat"}]
    ultrachat = recipes / "HuggingFaceH4/ultrachat_200k/data"
    ultrachat.mkdir(parents=True)
    for split in ("train_sft", "test_sft"):
        row = {"prompt": "the mat?", "prompt_id": "1", "messages": turns}
        Dataset.from_list([row] * 4).to_parquet(ultrachat / f"{split}-00000-of-00001.parquet")
    corpus = folder / "HuggingFaceFW/fineweb-edu"  # an arm names it, whose paths have no folder
    corpus.mkdir(parents=True)
    Dataset.from_list([{"text": "the cat sat"}] * 4).to_parquet(corpus / "train.parquet")
    images = recipes / "uoft-cs/cifar100"
    images.mkdir(parents=True)
    features = Features(
        {"img": Array3D((32, 32, 3), "uint8"), "fine_label": ClassLabel(names=FINE)}
    )
    for split in ("train", "test"):
        pixels = list(np.zeros((4, 32, 32, 3), np.uint8))
        made = Dataset.from_dict({"img": pixels, "fine_label": [0, 1, 2, 3]}, features=features)
        made.to_parquet(images / f"{split}.parquet")
    intents.mkdir(parents=True)
    labelled = "".join(f"the mat {n},{label}\n" for label in INTENTS for n in range(10))
    for split in ("train", "test"):
        (intents / f"banking77_{split}.csv").write_text(f"text,label\n{labelled}")
    for name, config in CONFIGS.items():
        if f"model: {name}" in recipe:
            config.save_pretrained(folder / name)
            other = {"text": OTHER_TEXT, "size": 276} if "SmolLM2" in name else {}
            tiny_tokenizer(**other).save_pretrained(folder / name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_passes_the_check(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = recipe.relative_to(ROOT)
    project(tmp_path, place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCORE_DATA", str(tmp_path / "public"))
    for module in (estimates, train_drafter):  # a product of these sizes takes a minute on a CPU
        monkeypatch.setattr(module, "throughput", lambda *_, **__: 1e12)
    monkeypatch.setattr(loading, "refuse_unusable_weights", lambda *_: None)  # there are none
    console.out.cache_clear()  # pytest's capture has replaced the streams
    console.err.cache_clear()
    assert f"#   kdcore check {place}\n" in recipe.read_text()
    assert main.run(["check", str(place)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_whose_it_is_what_it_needs_and_that_nobody_ran_it(recipe: Path) -> None:
    head = re.match(r"(?:#.*\n)+", recipe.read_text())
    for said in ("kdcore's", "Hardware: ", "(?i)not run by us", "paper's|published"):
        assert head and re.search(said, head[0]), f"{recipe.name} does not say {said}"
    assert f"`{recipe.relative_to(FOLDER)}`" in (FOLDER / "README.md").read_text()
