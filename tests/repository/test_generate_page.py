"""docs/generate.md: its Python runs from top to bottom, and a drafter changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcore.decoding.drafters.files import drafter_choice, save_drafter
from kdcore.method.registry import installed
from kdcore.models.assembly import Assembly
from kdcore.models.loading import load_model
from kdcore.specs.fields import ModelSpec
from tests.fixtures.pages import BLOCKS, ROOT
from tests.tiny.tiny_chat_models import saved, tiny_model


def save_untrained_drafter(folder: Path, model: Path) -> None:
    folder.mkdir(parents=True)
    target = load_model(ModelSpec(model=str(model)))
    choice = drafter_choice({"name": "medusa", "depth": 2}, installed(), "", "")
    drafter: Any = Assembly(installed()).build(choice)
    drafter.bind(target.model, target.tokenizer)
    save_drafter(folder, drafter, choice, target, installed())


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(tiny_model(), tmp_path / "path" / "to" / "model")
    save_untrained_drafter(tmp_path / "runs" / "drafter" / "drafter", model)
    page = ROOT / "docs" / "generate.md"
    speculative, streamed = (b for b in BLOCKS if b.page == page and b.language == "python")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(compile(speculative.text, str(speculative), "exec"), names)  # noqa: S102
    said = capsys.readouterr().out.removesuffix("\n")

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), names["tokenizer"]
    answer = plain.generate(**tokenizer("The lighthouse", return_tensors="pt"), max_new_tokens=64)
    assert torch.equal(names["answer"], answer)
    assert said == tokenizer.decode(answer[0], skip_special_tokens=True)

    exec(compile(streamed.text, str(streamed), "exec"), names)  # noqa: S102
    [asked] = AutoTokenizer.from_pretrained(model)(["The lighthouse"])["input_ids"]
    shown = capsys.readouterr().out.rstrip("\n")
    assert shown and shown in tokenizer.decode(answer[0]) and len(answer[0]) > len(asked)
