"""What each job does on an accelerator: nothing is left on the CPU.

The mock device raises where a tensor of the CPU meets one of its own, so that a job that ends has
left none there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.jobs.bench import bench
from kdcore.jobs.build_cache import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import evaluate
from kdcore.jobs.generate_data import generate_data
from kdcore.jobs.train_drafter import train_drafter
from kdcore.method.registry import installed
from kdcore.runs.folder import Run
from kdcore.specs.bench import BenchSpec
from kdcore.specs.distill import DistillSpec
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from tests.device.mock_device import DEVICE, MockDevice
from tests.tiny.tiny_chat_models import saved, tiny_model

ROWS = [{"prompt": f"the mat of {n}?", "response": f"the teacher sat {n}"} for n in range(6)]
TRAINING = {"batch_size": 2, "steps": 2, "eval_every": 1, "save_every": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        saved(tiny_model(seed=seed), folder / name)
    return folder


def source(folder: Path, count: int = len(ROWS)) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"name": "chat", "path": str(path), "limit": count}


def valid(model: Any, asked: dict[str, Any]) -> Any:
    return model.model_validate(asked, context={"registry": installed()})


def distilling(folder: Path, models: Path, **changes: Any) -> DistillSpec:
    asked: dict[str, Any] = {
        "job": "distill",
        "run": str(folder / "run"),
        "teacher": {"model": str(models / "teacher")},
        "student": {"model": str(models / "student")},
        "data": {"train": source(folder), "heldout": source(folder, 2)}
        | {"responses": {"by": "dataset"}},
        "training": TRAINING,
        "evaluation": {"samples": 1, "sample_tokens": 3, "answers": ["rouge_l"]}
        | {"answer_tokens": 3},
    }
    asked["data"] |= changes.pop("data", {})
    asked["training"] = TRAINING | changes.pop("training", {})
    return valid(DistillSpec, asked | changes)  # type: ignore[no-any-return]


def drafting(folder: Path, models: Path, drafter: dict[str, Any], **data: Any) -> TrainDrafterSpec:
    asked = {
        "job": "train-drafter",
        "run": str(folder / "drafter"),
        "target": {"model": str(models / "teacher")},
        "drafter": drafter,
        "data": {"train": source(folder), "heldout": source(folder, 2), **data}
        | {"responses": {"max_new_tokens": 6}},
        "training": TRAINING,
    }
    return valid(TrainDrafterSpec, asked)  # type: ignore[no-any-return]


METHODS: dict[str, dict[str, Any]] = {
    "sft": {"teacher": None, "method": {"terms": {"task": 1.0}, "gates": []}},
    "kd": {"method": {"gates": []}},
    "speckd": {"method": {"gates": [{"name": "speckd", "verification": "sampling"}]}},
    "deepkd": {
        "method": {"gates": [], "splitters": [{"name": "deepkd"}], "momentum": {"name": "deepkd"}}
        | {"terms": {"task": 1.0, "target": 1.0, "non_target": 1.0}},
    },
    "ranked": {"method": {"gates": [{"name": "student_entropy"}]}},
    "stateful": {"method": {"divergence": {"name": "akl"}}},
    "adapters": {"student": {"lora": {"r": 2, "dropout": 0.1}}},
    "probed": {"training": {"probe_every": 1, "probe_batches": 2}},
    "on policy": {
        "data": {"on_policy": {"probability": 1.0, "max_new_tokens": 3, "mix": 0.2}},
    },
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS.keys())
def test_a_student_is_trained_on_the_device(
    device: MockDevice, tmp_path: Path, models: Path, changes: dict[str, Any]
) -> None:
    run = distill(distilling(tmp_path, models, **dict(changes)))
    logged = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in logged if "loss" in line)
    assert run.finished
