"""The Python of docs/howto/generate.md runs, on a tiny model and a drafter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.drafters.files import save_drafter
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.fields import ModelSpec
from kdcore_baselines.drafting_components import MedusaParams
from tests.fixtures.pages import BLOCKS
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_the_page_drafts_and_streams_inside_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(), Path("path/to/model"))
    target = load_model(ModelSpec.model_validate({"model": "path/to/model"}))
    choice = Choice("drafter", "medusa", MedusaParams(depth=2))
    drafter = Assembly(installed()).build(choice)
    drafter.bind(target.model, target.tokenizer)
    folder = Path("runs/drafter/drafter")
    save_drafter(folder, drafter, choice, target, installed(), feature_rms=[1.0])

    blocks = [b for b in BLOCKS if b.page.name == "generate.md" and b.language == "python"]
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    exec(blocks[0].text, names)  # noqa: S102
    answer = capsys.readouterr().out
    model, inputs = names["model"], names["inputs"]
    plain = model.generate(**inputs, max_new_tokens=64)
    assert torch.equal(names["answer"], plain)
    exec(blocks[1].text, names)  # noqa: S102
    text = names["tokenizer"].decode(plain[0])
    assert answer.strip() and capsys.readouterr().out.strip() == text.partition("\n\n")[0].strip()
    exec(blocks[2].text, names)  # noqa: S102
    shown = names["tokenizer"].decode(plain[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == shown.strip()
