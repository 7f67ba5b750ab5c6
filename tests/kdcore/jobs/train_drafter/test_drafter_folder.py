"""Drafter folders that cannot be read: what is missing, damaged, or of another size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.components.choice import Choice
from kdcore.decoding.drafters.files import load_drafter, save_drafter
from kdcore.errors import UserError
from kdcore.jobs.train_drafter import train_drafter
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.fields import ModelSpec
from tests.kdcore.jobs.train_drafter.test_train_drafter import REGISTRY, spec_of
from tests.tiny.tiny_chat_models import saved, tiny_model
from tests.tiny.trained_drafters import bound


def test_another_target_is_refused_by_what_differs(tmp_path: Path, target: Path) -> None:
    run = train_drafter(spec_of(tmp_path, target, training={"steps": 1}), registry=REGISTRY)
    other = saved(tiny_model(seed=1), tmp_path / "other")
    loaded = load_model(ModelSpec.model_validate({"model": str(other)}))
    with pytest.raises(UserError, match=r"differs from .* in weights or config"):
        load_drafter(run.path("drafter"), loaded, REGISTRY)


def test_a_folder_without_a_drafter_and_a_damaged_one(tmp_path: Path, target: Path) -> None:
    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    with pytest.raises(UserError, match="does not contain a drafter"):
        load_drafter(target, loaded, REGISTRY)
    run = train_drafter(spec_of(tmp_path, target, training={"steps": 1}), registry=REGISTRY)
    said = run.path("drafter", "config.json").read_text()
    for name, value in (
        ("drafter", None),
        ("target", {}),
        ("plugin", 1),
        ("layers", 2),
        ("trained", {"template": None, "feature_rms": [], "figures": {"tau": "high"}}),
        ("trained", {"template": None, "feature_rms": [1.0, 1.0], "figures": {}}),
        ("trained", {}),
    ):
        run.path("drafter", "config.json").write_text(json.dumps(json.loads(said) | {name: value}))
        with pytest.raises(UserError, match=rf"field {name}[\w.]* of \S+ is missing or invalid"):
            load_drafter(run.path("drafter"), loaded, REGISTRY)
    run.path("drafter", "config.json").write_text(said)
    weights = run.path("drafter", "drafter.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="does not contain this drafter's weights"):
        load_drafter(run.path("drafter"), loaded, REGISTRY)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """A FastEagle of 2 levels that proposes 40 tokens."""
    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    drafter = bound("fasteagle", loaded.model, depth=2, vocabulary=40)
    params = REGISTRY.component("drafter", "fasteagle").params(depth=2, vocabulary=40)
    folder = tmp_path_factory.mktemp("made")
    save_drafter(folder, drafter, Choice("drafter", "fasteagle", params), loaded, REGISTRY)
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "cause"),
    [
        ("vocabulary", lambda known: known + 290, "its vocabulary exceeds the 290 tokens of"),
        ("vocabulary", lambda known: known - 1, "its vocabulary exceeds the 290 tokens of"),
        ("vocabulary", torch.Tensor.float, "vocabulary has dtype torch.float32, not torch.int64"),
        ("norms", torch.Tensor.long, "norms has dtype torch.int64, not torch.float32"),
        (
            "norms",
            lambda norms: norms[:1],
            "norms has the shape .1, 16., and config.json makes it .2, 16. by depth: 2",
        ),
        ("new", lambda norms: torch.ones(2), "the file has new, which config.json does not make"),
        ("norms", None, "config.json makes norms, which the file lacks"),
    ],
)
def test_weights_that_are_not_the_drafters_are_named(
    tmp_path: Path, target: Path, made: Path, name: str, changes: Any, cause: str
) -> None:
    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    shutil.copytree(made, tmp_path / "made")
    weights = load_file(tmp_path / "made" / "drafter.safetensors")
    changed = weights.pop(name, None)
    if changes is not None:
        weights[name] = changes(changed).contiguous()
    save_file(weights, tmp_path / "made" / "drafter.safetensors")
    with pytest.raises(UserError, match=f"not contain this drafter's weights: .*{cause}"):
        load_drafter(tmp_path / "made", loaded, REGISTRY)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ({"name": "ngram"}, "names the drafter 'ngram', which does not have weights"),
        ({"name": "zork"}, "unknown drafter 'zork'"),
        ({"name": "fasteagle", "depth": -1}, "drafter.depth must be"),
        ({"name": "fasteagle", "tree": "zork"}, "unknown tree 'zork'"),
    ],
)
def test_a_drafter_that_cannot_be_built_is_told_by_what_is_wrong(
    tmp_path: Path, target: Path, made: Path, said: dict[str, Any], cause: str
) -> None:
    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    shutil.copytree(made, tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    (tmp_path / "made" / "config.json").write_text(json.dumps(config | {"drafter": said}))
    with pytest.raises(UserError, match=cause):
        load_drafter(tmp_path / "made", loaded, REGISTRY)


@pytest.mark.parametrize(
    ("name", "changes", "said", "cause"),
    [
        ("eagle3", {"depth": 10**9}, 10**9, "drafter.depth must be less"),
        ("eagle3", {"depth": 1000}, 1000, "1000 levels"),
        ("eagle3", {"depth": 5}, 2, "5 levels, but its weights have 2"),
        ("eagle3", {"layer": {"ffn": 10**6}}, 2, "more than .* weights"),
        ("fasteagle", {"depth": 10**9}, 10**9, "drafter.depth must be less"),
        ("fasteagle", {"depth": 1000}, 1000, "1000 levels"),
        ("fasteagle", {"ffn": 10**6}, 2, "more than .* weights"),
        ("fasteagle", {"ffn": 10**13}, 2, "drafter.ffn must be less"),
    ],
)
def test_sizes_that_the_weights_belie_are_refused_before_memory_is_taken(
    tmp_path: Path, target: Path, name: str, changes: dict[str, Any], said: int, cause: str
) -> None:
    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    drafter = bound(name, loaded.model, depth=2)
    params = REGISTRY.component("drafter", name).params(depth=2)
    save_drafter(tmp_path / "made", drafter, Choice("drafter", name, params), loaded, REGISTRY)
    load_drafter(tmp_path / "made", loaded, REGISTRY)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    config["drafter"] |= changes
    config["depth"] = said
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=cause):
        load_drafter(tmp_path / "made", loaded, REGISTRY)
