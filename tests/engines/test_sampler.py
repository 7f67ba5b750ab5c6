"""vLLM samples the student's responses, with weights that follow the training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.specs.distill import DistillSpec
from tests.engines.api_server import LIMITS, MODULE, serving
from tests.engines.served import target_in
from tests.tiny.tiny_chat_models import saved, tiny_model

TEXTS = ["the mat of the teacher", "why?", "for the student", "so and so", "the cat sat"]
STEPS = 4
LORA = {"lora": {"r": 4, "alpha": 16.0}}
SETTINGS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved(tiny_model(seed=1), folder / "teacher")
    target_in(folder / "a student")
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[str]:
    """Of the student, for either way to send weights."""
    model = shlex.quote(str(models / "a student"))
    command = f"python -m {MODULE} --model {model} {LIMITS} --enable-lora --max-lora-rank 8"
    with serving(command, **SETTINGS) as address:
        yield address


def losses(folder: Path, models: Path, sampler: Any, **student: Any) -> list[tuple[float, float]]:
    """The loss and the sampled tokens of each step."""
    folder.mkdir()
    rows = [{"prompt": text, "response": "the student sat"} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = {"probability": 1.0, "max_new_tokens": 12, "temperature": 0.0, "sampler": sampler}
    spec = DistillSpec.model_validate(
        {
            "job": "distill",
            "run": str(folder / "run"),
            "teacher": {"model": str(models / "teacher")},
            "student": {"model": str(models / "a student"), **student},
            "data": {
                "train": {"name": "chat", "path": str(folder / "rows.jsonl")},
                "on_policy": policy,
            },
            "training": {"steps": STEPS, "batch_size": 4, "learning_rate": 0.01},
            "evaluation": {"samples": 0},
        }
    )
    lines = map(json.loads, distill(spec).path("metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["on_policy/tokens"]) for line in lines if "loss" in line]


def test_responses_are_those_of_the_student_itself(
    server: str, models: Path, tmp_path: Path
) -> None:
    """Greedily, while its weights change; a sampler with its first weights gives other ones.

    Adapters first: the server keeps the weights of a whole student.
    """
    there = {"endpoint": f"{server}/v1", "model": str(models / "a student")}
    for name, student in (("adapters", LORA), ("whole", {})):
        near = losses(tmp_path / name, models, None, **student)
        far = losses(tmp_path / f"{name} sampled", models, there, **student)
        assert [tokens for _, tokens in far] == [tokens for _, tokens in near]
        assert [loss for loss, _ in far] == pytest.approx([loss for loss, _ in near], rel=1e-3)
        stale = {**there, "staleness": STEPS}
        if student:
            old = losses(tmp_path / f"{name} old", models, stale, **student)
            assert [loss for loss, _ in old] != pytest.approx([loss for loss, _ in near], rel=1e-3)
    with pytest.raises(UserError, match="runs another model than the student"):
        losses(tmp_path / "other", models, there, **LORA)
