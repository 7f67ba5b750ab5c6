"""``kdcore doctor`` on a target without a chat template, and in other dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.components.registry import installed
from kdcore.decoding.drafters.files import save_drafter
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.cli.conftest import Said
from tests.tiny.tiny_chat_models import saved, tiny_model

Doctor = Callable[..., Said]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An untrained drafter's, and its target's, which has no chat template."""
    place, registry = tmp_path_factory.mktemp("doctor"), installed()
    made = tiny_model(template=None)
    with torch.no_grad():  # so small that bfloat16's rounding does not grow from layer to layer
        for weight in made.model.parameters():
            if weight.ndim > 1:
                weight *= 0.2
    target = saved(made, place / "target")
    loaded = load_model(ModelSpec(model=str(target)))
    choice: Any = DraftingSpec.model_validate({"drafter": "fasteagle"}).drafter
    drafter = Assembly(registry).build(choice)
    drafter.bind(loaded.model, loaded.tokenizer)
    save_drafter(place / "drafter", drafter, choice, loaded, registry)
    return str(place / "drafter"), str(target)


@pytest.fixture
def doctor(
    folders: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Doctor:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        console.out.cache_clear()
        console.err.cache_clear()
        code = main.run(["doctor", *folders, "--max-new-tokens", "8", "--json", *arguments])
        out, err = capsys.readouterr()
        return Said(code, out, " ".join(err.split()))

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_without_a_template_is_gone_on_from(doctor: Doctor, dtype: str) -> None:
    said = doctor("--raw", "--prompt", "the teacher sat", "--dtype", dtype)
    assert said.out, said.err
    found = {each["check"]: each["verdict"] for each in json.loads(said.out)}
    assert found["target"] == found["features"] == found["proposals"] == "fine"
    assert "output" in found


def test_what_cannot_be_examined_is_refused(doctor: Doctor) -> None:
    refused = {
        (): "add --raw to continue the text without a template",
        ("--raw", "--prompt", "the mat", "--prompt", "x"): "prompt 2 has 1 token;",
        ("--raw", "--dtype", "int8"): "--dtype",
    }
    for arguments, words in refused.items():
        said = doctor(*arguments)
        assert said.code == 2
        assert words in said.err
