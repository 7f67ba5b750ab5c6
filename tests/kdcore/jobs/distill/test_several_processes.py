"""Two processes (gloo) reach the weights of one: DDP with one and two streams, FSDP2 with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcore.jobs.distill import distill
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run_with_a_sharded_teacher, train
from tests.kdcore.training.trainer.test_trainer import DEEPKD, trainer
from tests.tiny.tiny_chat_models import saved, tiny_model

SPECKD: dict[str, Any] = {"gates": ["speckd"]}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


PROBED = [f"gsnr/{term}" for term in ("task", "target", "non_target")]
GREEDY = {"policy": "interleaved", "top_k": 3, "probability": 0.6, "temperature": 0.0}
SAMPLED = {"on_policy": GREEDY, "optim": "sgd"}
"""Without chance, what a row's response is does not depend on who samples it. Plain descent, since
adamw makes as much of a gradient that is all rounding as of any."""


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (SPECKD, {}),
        (DEEPKD | SPECKD, {"probe": [2, 3]}),
        (SPECKD, FSDP2),
        (DEEPKD | SPECKD | {"momentum": {"name": "deepkd", "clip": 0.5}}, FSDP2),
        (SPECKD, SAMPLED),
    ],
    ids=[
        "one stream",
        "two streams, probed",
        "one stream, sharded",
        "two streams, clipped, sharded",
        "on policy",
    ],
)
def test_two_processes_reach_the_weights_of_one(
    tmp_path: Path, method: dict[str, Any], arguments: dict[str, Any]
) -> None:
    in_two_processes(tmp_path, train, tmp_path, method, arguments)
    same = {name: given for name, given in arguments.items() if not name.startswith("fsdp")}
    alone = trainer(tmp_path / "alone", method, per_device_train_batch_size=12, **same)
    alone.train()
    logged = json.loads((tmp_path / "log.json").read_text())
    for ours, theirs in zip(logged[:-1], alone.state.log_history[:-1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", *PROBED}:  # a probe's batches are a process's
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    together = load_file(tmp_path / "weights")
    for name, value in alone.model.named_parameters():
        torch.testing.assert_close(together[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_the_command_line_shards_the_teacher_over_two_processes(tmp_path: Path) -> None:
    teacher = saved(tiny_model(), tmp_path / "teacher")
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "chat", "path": str(tmp_path / "rows.jsonl")}
    spec: dict[str, Any] = {
        "job": "distill",
        "run": str(tmp_path / "run"),
        "teacher": {"model": str(teacher), "device": "sharded"},
        "student": {"model": str(teacher), "layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 2, "save_every": 1},
        "evaluation": {"samples": 1, "sample_tokens": 3},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    command = ["distill", str(tmp_path / "spec.yaml")]
    said = in_two_processes(tmp_path, run_with_a_sharded_teacher, command)
    assert "".join(said).count("student:") == 1
    spec["run"], spec["training"]["batch_size"] = str(tmp_path / "alone"), 4
    alone = distill(DistillSpec.model_validate(spec | {"teacher": {"model": str(teacher)}}))
    together, whole = (losses(Path(folder)) for folder in (tmp_path / "run", alone.folder))
    assert together.keys() == {1, 2}
    assert together == pytest.approx(whole, rel=1e-4)
    ours, theirs = (
        Run(folder).read_json("results.json") for folder in (tmp_path / "run", alone.folder)
    )
    assert ours["samples"] == theirs["samples"]
    assert ours["after"] == pytest.approx(theirs["after"], rel=1e-3)


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of the training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}
