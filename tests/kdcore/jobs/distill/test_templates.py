"""A run's template: that of the spec, kept by the student, with one date from start to end."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kdcore.jobs.caches.build import build_cache, validate_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import spec_of as evaluation_of
from kdcore.jobs.preflight.distill import preflight
from kdcore.runs.today import today
from kdcore.specs.distill import DistillSpec
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import CHATML, saved, tiny_model

DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    turns = [{"role": "user", "content": "the mat?"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": f"it sat {n}"}]} for n in range(4)
    ]
    rows[3]["messages"][1]["mood"] = "glad"
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "dated.jinja").write_text(DATED)
    return {"train": {"name": "chat", "path": tmp_path / "rows.jsonl"}}


def spec_of(folder: Path, teacher: Path, data: dict[str, Any]) -> DistillSpec:
    return DistillSpec.model_validate(
        {
            "run": folder / "run",
            "teacher": {"model": str(teacher), "template": folder / "dated.jinja"},
            "student": {"layers": [0]},
            "data": data,
            "training": {"batch_size": 2, "save_every": 1},
            "evaluation": {"samples": 0},
        }
    )


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(day)

    monkeypatch.setattr("kdcore.runs.today.datetime", Then)


def test_a_run_is_resumed_after_midnight(
    tmp_path: Path, teacher: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, teacher, data)
    on("2024-02-28", monkeypatch)
    run = distill(spec)
    assert AutoTokenizer.from_pretrained(run.path("model")).chat_template == DATED
    (run.folder / "README.md").unlink()  # as if it had been killed before its end
    on("2024-02-29", monkeypatch)
    assert distill(spec, resume=True).finished
    assert run.facts.date == evaluation_of(run)["date"] == "2024-02-28"
    assert today().day == 29  # the pin ends with the run


def test_a_cache_lends_its_date_to_its_runs(
    tmp_path: Path, teacher: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, teacher, data)
    on("2024-02-28", monkeypatch)
    build_cache(spec, tmp_path / "cache", k=4)
    on("2024-02-29", monkeypatch)
    cache = build_cache(spec, tmp_path / "cache", k=4)
    assert cache.rows == 4 and cache.manifest.date == "2024-02-28"
    validate_cache(tmp_path / "cache", spec)
    cached = spec_of(tmp_path, teacher, data | {"teacher_cache": tmp_path / "cache"})
    preflight(cached)
    assert distill(cached).facts.date == "2024-02-28" and today().day == 29


def test_check_tells_what_the_template_leaves_out(
    tmp_path: Path, teacher: Path, data: dict[str, Any]
) -> None:
    notes = preflight(spec_of(tmp_path, teacher, data)).train.notes
    assert notes == {"the chat template does not read 'mood'": "rows.jsonl:4"}
