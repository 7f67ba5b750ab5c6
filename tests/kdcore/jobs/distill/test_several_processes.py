"""Two processes (gloo) reach the weights of one: DDP with one and two streams, FSDP2 with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.forked import in_two_processes
from tests.fixtures.two_processes import run, train
from tests.kdcore.training.test_trainer import DEEPKD, trainer
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
        (SPECKD, SAMPLED),
    ],
    ids=["one stream", "two streams, probed", "one stream, sharded", "on policy"],
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


def test_the_command_line_runs_in_two_processes(tmp_path: Path) -> None:
    teacher = saved(tiny_model(), tmp_path / "teacher")
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "chat", "path": "rows.jsonl"}
    spec = {
        "job": "distill",
        "run": str(tmp_path / "run"),
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 2, "save_every": 1},
        "evaluation": {"samples": 1, "sample_tokens": 3},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    said = in_two_processes(tmp_path, run, ["distill", str(tmp_path / "spec.yaml")])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "grad_norm" in line] == [1, 2]
    assert "".join(said).count("student:") == 1
