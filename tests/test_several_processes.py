"""Two processes (DDP, gloo) reach the weights that one process reaches, for one and two streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import DEEPKD, trainer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "method", [{"gates": ["speckd"]}, DEEPKD | {"gates": ["speckd"]}], ids=["one", "two streams"]
)
def test_two_processes_reach_the_weights_of_one(tmp_path: Path, method: dict[str, Any]) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "tests.two_processes", str(tmp_path), json.dumps(method)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = trainer(tmp_path / "alone", method, per_device_train_batch_size=12)
    alone.train()
    together = load_file(tmp_path / "weights")
    for name, value in alone.model.named_parameters():
        torch.testing.assert_close(together[name], value.detach(), rtol=1e-4, atol=1e-6)
