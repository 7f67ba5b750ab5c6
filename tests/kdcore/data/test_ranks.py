"""Two processes (gloo) make the files of one, each a share; a killed run's shares are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcore.data.ranks import ALONE
from kdcore.data.responses.file import respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.runs.progress import Silent
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import make, refuse
from tests.kdcore.data.responses.test_file import ASKED, SPEC
from tests.tiny.tiny_chat_models import tiny_model

FILES = ["answers.jsonl", "answers.manifest.json", "states/manifest.json"]


def made_by(folder: Path, number: int) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = json.loads((folder / f"made-{number}.json").read_text())
    return made


def test_two_processes_make_the_files_of_one_each_its_share(tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    both.mkdir()
    alone.mkdir()
    in_two_processes(both, make, both)
    make(alone)
    shards = [f"states/{path.name}" for path in (alone / "states").glob("shard-*")]
    assert len(shards) > 2
    for name in FILES + shards:
        assert (both / name).read_bytes() == (alone / name).read_bytes(), name
    assert not [*both.rglob("*.part*")]
    whole, (first, second) = made_by(alone, 0), (made_by(both, number) for number in range(2))
    for what in ("batches", "rows"):
        assert first[what], f"the main process made no {what}"
        assert second[what], f"the other process made no {what}"
        assert sorted(first[what] + second[what]) == sorted(whole[what])
    assert first["tokens"] == second["tokens"] == whole["tokens"]


def test_what_the_main_process_refuses_ends_every_process(tmp_path: Path) -> None:
    in_two_processes(tmp_path, refuse, tmp_path)


def test_the_share_of_a_killed_process_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "answers.jsonl", tiny_model(seed=1)
    respond(ASKED, ModelAnswers(model, SPEC), path, Silent())
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    path.with_suffix(".part1.jsonl").write_text("".join(lines[2:]))
    answerer = ModelAnswers(model, SPEC)
    monkeypatch.setattr(answerer, "answers", lambda batches: iter([] if not batches else [1 / 0]))
    respond(ASKED, answerer, path, Silent(), ALONE)
    assert path.read_text() == whole
    assert not path.with_suffix(".part1.jsonl").exists()
