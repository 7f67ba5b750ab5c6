"""What a run folder may be is known before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.runs.comparison_results import refuse_unmeasured
from kdcore.runs.facts import ModelOrigin
from kdcore.runs.folder import Run
from kdcore.specs.generate_data import GenerateDataSpec


def cause_of(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        Run(folder, planned=True).refuse_foreign()
    assert "run=FOLDER" in refused.value.cure
    return refused.value.cause


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "{}", '{"versions": 1}'])
def test_a_damaged_record_is_not_called_another_programs_folder(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "spec.yaml").write_text("job: distill\n")
    (tmp_path / "run.json").write_text(content)
    assert cause_of(tmp_path).startswith(f"{tmp_path / 'run.json'} is damaged")
    (tmp_path / "spec.yaml").unlink()
    assert cause_of(tmp_path).endswith("already exists and is not a run folder")


def test_a_folder_that_cannot_be_made_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert cause_of(tmp_path / "file" / "runs" / "one") == (
        f"{tmp_path / 'file' / 'runs' / 'one'} cannot be written: {tmp_path / 'file'} is a file"
    )
    (tmp_path / "loop").symlink_to("loop")
    assert cause_of(tmp_path / "loop" / "one").endswith(f"{tmp_path / 'loop'} is not a folder")
    assert not Run(tmp_path / "runs" / "one", planned=True).refuse_foreign()
    real = os.access

    def read_only(path: Any, mode: int) -> bool:
        return real(path, mode) and Path(path) != tmp_path

    monkeypatch.setattr(os, "access", read_only)
    assert cause_of(tmp_path / "runs" / "one").endswith(f"{tmp_path} is not writable")


@pytest.mark.parametrize(
    ("at", "fault", "status"),
    [
        ("spec.yaml", KeyboardInterrupt(), "interrupted"),
        ("spec.yaml", OSError(), "failed"),
        ("run.json", KeyboardInterrupt(), None),  # before there is a run
        ("run.json", OSError(), None),
    ],
)
def test_a_run_that_is_stopped_while_it_opens_is_not_called_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, fault: Any, status: str | None
) -> None:
    faults = [fault]

    def stopped(self: Run, name: str, text: str) -> None:
        if name == at and faults:
            raise faults.pop()
        write_text(self, name, text)

    write_text = Run.write_text
    spec = GenerateDataSpec.model_validate(SPEC)
    with monkeypatch.context() as patch, pytest.raises(type(fault)):
        patch.setattr(Run, "write_text", stopped)
        Run.open(tmp_path / "run", spec, installed())
    assert not status or Run(tmp_path / "run").status == status
    with Run.open(tmp_path / "run", spec, installed(), resume=True).closed_after():
        assert Run(tmp_path / "run").status == "running"
    assert Run(tmp_path / "run").status == "done"


SPEC = {"job": "generate-data", "teacher": {"model": "a"}, "source": {"name": "chat", "path": "b"}}


def opened(folder: Path, **options: bool) -> Run:
    return Run.open(folder, GenerateDataSpec.model_validate(SPEC), installed(), **options)


def test_a_run_that_ended_before_any_work_gives_its_folder_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mistake"), opened(tmp_path).closed_after():
        raise UserError("a mistake", "fix it")
    Run(tmp_path).update(teacher=ModelOrigin("a", "digest"))
    with pytest.raises(UserError, match="mistake"), opened(tmp_path).closed_after():
        assert Run(tmp_path).facts.teacher is None  # nothing of the first one is left
        (tmp_path / "responses.jsonl").touch()
        raise UserError("a mistake", "fix it")
    with pytest.raises(UserError, match="already contains a run"):
        opened(tmp_path)
    (tmp_path / "responses.jsonl").unlink()
    with pytest.raises(UserError, match="another process"), opened(tmp_path).closed_after():
        opened(tmp_path)
    with opened(tmp_path).closed_after():
        pass
    with pytest.raises(UserError, match="already contains a run"):  # it is done
        opened(tmp_path)


@pytest.mark.parametrize("fault", [FileNotFoundError(2, "none"), RuntimeError("of a library")])
@pytest.mark.parametrize("again", [False, True], ids=["removed", "made again by a library"])
def test_a_run_folder_that_is_removed_under_the_run(
    tmp_path: Path, again: bool, fault: Exception
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError) as told, opened(folder).closed_after():
        shutil.rmtree(folder)
        if again:
            (folder / "checkpoint-1").mkdir(parents=True)
        raise fault
    assert told.value.cause == f"{folder} was removed or replaced while the run wrote it"


@pytest.mark.parametrize(
    ("job", "metric"),
    [("distill", "rouge_l"), ("train-drafter", "level_12"), ("another", "foo"), ("distill", None)],
)
def test_a_metric_that_a_job_may_measure_passes(job: str, metric: str | None) -> None:
    refuse_unmeasured("--metric", metric, job)


@pytest.mark.parametrize(("job", "metric"), [("distill", "foo"), ("train-drafter", "perplexity")])
def test_a_metric_that_no_run_of_a_job_measures(job: str, metric: str) -> None:
    with pytest.raises(UserError, match=f"--metric: unknown metric '{metric}'"):
        refuse_unmeasured("--metric", metric, job)
