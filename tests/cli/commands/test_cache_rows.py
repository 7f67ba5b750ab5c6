"""``kdcore cache rows`` lists encoded rows, and removes those that no process uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcore.data.encoded.encode import encoded_rows
from kdcore.runs.progress import Silent
from tests.cli.conftest import Kdcore
from tests.kdcore.data.encoded.test_encoded_rows import Encodes, row
from tests.tiny.tiny_chat_models import tiny_tokenizer


def test_rows_are_listed_and_cleared(
    kdcore: Kdcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "rows of others"))
    assert "0 folders of rows" in kdcore("cache", "rows").out
    tokenizer = tiny_tokenizer()
    used, _ = encoded_rows(Encodes([row(0, 9)], "used"), tokenizer, 20, Silent())
    encoded_rows(Encodes([row(0, 9)], "old"), tokenizer, 20, Silent())
    listed = json.loads(kdcore("cache", "rows", "--json").out)
    assert len(listed) == 2 and all(each["bytes"] > 0 for each in listed)
    assert "removed 1 folder of rows" in (said := kdcore("cache", "rows", "--clear").out)
    assert "1 are in use" in said
    assert len(json.loads(kdcore("cache", "rows", "--json").out)) == 1 and len(used) == 1
