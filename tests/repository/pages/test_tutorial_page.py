"""The Python of docs/tutorial.md runs, on a tiny student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.pages import BLOCKS
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_the_student_answers_in_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(), Path("runs/first/model"))
    (block,) = [b for b in BLOCKS if b.page.name == "tutorial.md" and b.language == "python"]
    names: dict[str, Any] = {}
    exec(block.text, names)  # noqa: S102
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()
