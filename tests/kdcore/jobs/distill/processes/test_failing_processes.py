"""What fails in one of two processes (gloo) ends both, with its cause and the exit code 2."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kdcore.runs.folder import Run
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run_failing
from tests.kdcore.jobs.distill.processes.test_several_processes import FSDP2
from tests.tiny.tiny_chat_models import saved, tiny_model

TRAINER = "kdcore.training.trainer.checkpointing:CheckpointingTrainer"


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    teacher = saved(tiny_model(), tmp_path / "teacher")
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher {n}"} for n in range(8)]
    source = {"name": "chat", "path": str(written(tmp_path / "rows.jsonl", rows))}
    return {
        "job": "distill",
        "run": str(tmp_path / "run"),
        "teacher": {"model": str(teacher)},
        "student": {"model": str(saved(tiny_model(seed=1), tmp_path / "student"))},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 1, "save_every": 1},
        "evaluation": {"samples": 1, "sample_tokens": 3},
    }


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def both_said(
    tmp_path: Path, asked: dict[str, Any], who: int = 0, place: str = "", *, sharded: bool = False
) -> list[str]:
    """What both processes said that ended with the exit code 2."""
    (tmp_path / "spec.yaml").write_text(json.dumps(asked))  # JSON is YAML
    words = ["distill", str(tmp_path / "spec.yaml"), "--quiet"]
    return in_two_processes(tmp_path, run_failing, words, who, place, sharded, ends=2)


@pytest.mark.parametrize(
    ("who", "place"),
    [
        (0, "kdcore.models.fit.pair:load_model"),
        (0, "kdcore.training.rows:encode_rows"),
        (0, f"{TRAINER}._save_optimizer_and_scheduler"),
        (1, "kdcore.training.trainer.trainer:DistillationTrainer.training_step"),
        (0, "kdcore.jobs.distill:save_student"),
        (0, "kdcore.jobs.distill:model_card"),
    ],
    ids=["teacher", "rows", "checkpoint", "a step of the other", "student", "last file"],
)
def test_a_failure_of_one_process_is_that_of_both(
    tmp_path: Path, asked: dict[str, Any], who: int, place: str
) -> None:
    for said in both_said(tmp_path, asked, who, place):
        assert "it is broken" in said and "mend it" in said
        assert "Traceback" not in said and "internal error" not in said
    assert Run(tmp_path / "run").status == "failed"


def test_a_student_that_the_main_process_cannot_load_ends_both(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Only that process reads the weights of a student that is to be sharded."""
    weights = tmp_path / "student/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    asked["training"]["trainer"] = FSDP2
    first, second = both_said(tmp_path, asked, sharded=True)
    assert "model.safetensors" in first or "student" in first
    cause = first[first.index("transformers cannot read") :].split("\n")[0]
    assert cause in second and "Traceback" not in first + second


def test_a_run_folder_that_the_main_process_refuses_ends_both(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").touch()
    for said in both_said(tmp_path, asked):
        assert "already exists and is not a run folder" in said and "Traceback" not in said


def test_rows_that_cannot_be_encoded_end_both(tmp_path: Path, asked: dict[str, Any]) -> None:
    written(tmp_path / "rows.jsonl", [{"prompt": "a", "response": 3}])
    for said in both_said(tmp_path, asked):
        assert "rows.jsonl:1" in said and "Traceback" not in said


def test_a_mistake_leaves_a_folder_that_another_run_may_take(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    both_said(tmp_path, asked, 0, "kdcore.models.fit.pair:load_model")
    (tmp_path / "spec.yaml").write_text(json.dumps(asked | {"seed": 2}))
    in_two_processes(tmp_path, run_failing, ["distill", str(tmp_path / "spec.yaml")], 0, "", False)
    assert Run(tmp_path / "run").status == "done"
    assert not (tmp_path / "run/fault.json").exists()


def test_a_process_that_is_killed_ends_the_other(tmp_path: Path, asked: dict[str, Any]) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(asked))
    place = "kdcore.training.trainer.trainer:DistillationTrainer.killed training_step"
    words = ["distill", str(tmp_path / "spec.yaml"), "--quiet"]
    codes = {0: 2, 1: -signal.SIGKILL}
    said, _ = in_two_processes(tmp_path, run_failing, words, 1, place, False, ends=codes)
    assert "another process of this run was lost" in said and "Traceback" not in said
