"""``kdcore bench`` from a spec to a table and a page that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kdcore.reporting.page import report
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_a_table_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    console.out.cache_clear()
    console.err.cache_clear()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the mat"}\n{"prompt": "<script>sat"}\n')
    spec = {
        "job": "bench",
        "run": str(tmp_path / "run"),
        "target": {"model": str(saved(tiny_model(), tmp_path / "target"))},
        "methods": {"copies": {"drafter": "ngram"}},
        "sets": {"mine": {"name": "chat", "path": str(tmp_path / "prompts.jsonl")}},
        "max_new_tokens": 6,
    }
    file = tmp_path / "bench.yaml"
    file.write_text(json.dumps(spec))
    assert main.run(["bench", str(file)]) == 0
    ratio = r"[\d.]+ \[[\d.]+, [\d.]+\]"
    row = rf"copies +[\d.]+ +{ratio} +{ratio} +[\d.]+ +(\d+% +)?100%"
    assert re.search(row, capsys.readouterr().out)
    page = (tmp_path / "run" / "bench.html").read_text("utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]* (src|href)=", page)
    assert page == report([tmp_path / "run"]), "as kdcore report draws it"
    assert "Decoding speed of" in page and "on each task set: temperature 0, batch size 1" in page
    assert main.run(["bench", str(file), "--resume", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in outcome["rows"]] == ["generate", "plain", "copies"]
