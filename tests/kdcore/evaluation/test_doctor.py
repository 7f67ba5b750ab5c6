"""Each fault that keeps a drafter from being accepted is found, and a healthy one is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.components.choice import Choice
from kdcore.decoding.drafters.files import save_drafter, template_digest
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.evaluation.doctor import Finding, examine
from kdcore.evaluation.drafts import feature_rms
from kdcore.method.records import Batch
from kdcore.models.loading.loaded import LoadedModel
from kdcore.training.views import DrafterView
from tests.tiny.tiny_chat_models import tiny_model
from tests.tiny.toy_drafter import Matrices, Params, registry

REGISTRY = registry()
PROMPTS = [[5, 9, 17, 30], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return tiny_model(seed=3)


def folder_of(path: Path, target: LoadedModel, scale: float = 1.0) -> Path:
    """A drafter that knows by heart what the target does after any token: its level 1 is exact."""
    params = Params()
    drafter = Matrices(params, None)
    torch.manual_seed(0)
    drafter.bind(target.model, target.tokenizer)
    tokens = torch.tensor([[*PROMPTS[0], *PROMPTS[1]]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch = Batch(inputs, tokens, torch.ones_like(tokens).bool(), torch.zeros(1))
    features, _ = DrafterView(target.model, drafter).read(batch)
    save_drafter(
        path,
        drafter,
        Choice("drafter", "matrices", params),
        target,
        REGISTRY,
        template=template_digest(target),
        feature_rms=[scale * each for each in feature_rms(features, 1)],
        figures={"level_1": 0.0},
    )
    return path


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {each.check: each.verdict for each in findings}


def test_a_sound_drafter_has_nothing_wrong(tmp_path: Path, target: LoadedModel) -> None:
    found = verdicts(examine(folder_of(tmp_path, target), target, PROMPTS, REGISTRY, 12))
    assert "wrong" not in found.values()
    assert {"features", "proposals", "size of the features", "shift"} <= found.keys()
    assert all(found[name] == "fine" for name in ("features", "proposals", "chat template"))


def test_another_target_ends_the_examination(tmp_path: Path, target: LoadedModel) -> None:
    other = replace(target, digest="another", name="another")
    (first, _) = examine(folder_of(tmp_path, target), other, PROMPTS, REGISTRY)
    assert (first.check, first.verdict, first.found) == ("target", "wrong", "weights or config")


def test_another_template_and_other_sizes_are_told(tmp_path: Path, target: LoadedModel) -> None:
    folder = folder_of(tmp_path, target, scale=5.0)
    config = json.loads((folder / "config.json").read_text())
    config["trained"]["template"] = "another"
    (folder / "config.json").write_text(json.dumps(config))
    found = verdicts(examine(folder, target, PROMPTS, REGISTRY, 12))
    assert found["chat template"] == found["size of the features"] == "weak"


@pytest.mark.parametrize("fault", ["reads the token before", "forgets its features"])
def test_serving_that_is_not_training_is_found(
    tmp_path: Path, target: LoadedModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = folder_of(tmp_path, target)
    sound = Matrices.propose

    def faulty(self: Any, tokens: Any, features: Any, lengths: Any, generator: Any) -> Any:
        if fault == "reads the token before":
            tokens = tokens.roll(1, 0) * 0 + 7
        else:
            features = features * 0
        return sound(self, tokens, features, lengths, generator)

    monkeypatch.setattr(Matrices, "propose", faulty)
    assert verdicts(examine(folder, target, PROMPTS, REGISTRY, 12))["proposals"] == "wrong"


def test_an_engine_that_returns_other_layers_is_found(
    tmp_path: Path, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks of serving run the engine that serves."""
    from kdcore.evaluation import doctor

    def shifted(loaded: LoadedModel, layers: tuple[int, ...], *_: Any) -> TorchEngine:
        engine = TorchEngine()
        engine.bind(loaded.model, tuple(layer - 1 for layer in layers))
        return engine

    folder = folder_of(tmp_path, target)
    monkeypatch.setattr(doctor, "bound_engine", shifted)
    assert verdicts(examine(folder, target, PROMPTS, REGISTRY, 12))["features"] == "wrong"


def test_labels_shifted_in_training_are_found(tmp_path: Path, target: LoadedModel) -> None:
    """A drafter that proposes, at level 1, the token that is there already."""
    folder = folder_of(tmp_path, target)

    class Echo(Matrices):
        def forward(self, tokens: Any, features: Any) -> Any:
            # the head of the target finds a token's own embedding likeliest: they are tied
            seen = self._shared[0](tokens.roll(-1, 1)) * 50
            return torch.stack([seen] * self.depth, 2)

    import tests.tiny.toy_drafter as toys

    kept, toys.Matrices = toys.Matrices, Echo  # type: ignore[misc]
    try:
        found = {f.check: f for f in examine(folder, target, PROMPTS, REGISTRY, 12)}
    finally:
        toys.Matrices = kept  # type: ignore[misc]
    assert found["shift"].verdict == "wrong"
    assert "an offset of -1" in found["shift"].words
