"""A served teacher teaches two processes (gloo), sharded or not, what it teaches one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcore.jobs.distill import distill
from kdcore.models.loading.load import load_model
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.fixtures.apps.endpoint_app import Endpoint, served
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run, run_sharded
from tests.kdcore.jobs.distill.processes.test_several_processes import FSDP2
from tests.tiny.distill_specs import chats_in, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

CHATS = [{"prompt": f"the mat of {n}?", "response": f"the teacher sat {n}"} for n in range(8)]
SAMPLED = {"probability": 1.0, "max_new_tokens": 5, "temperature": 0.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Endpoint]:
    folder = saved(tiny_model(), tmp_path / "teacher")
    with served(Endpoint(load_model(ModelSpec(model=str(folder))))) as running:
        yield running


def scored(server: Endpoint) -> list[tuple[int, ...]]:
    """The rows that a server scored, without the checks."""
    prompts = [body["prompt"] for body in server.asked if "prompt" in body]
    return sorted(tuple(prompt) for prompt in prompts if not isinstance(prompt, str))


@pytest.mark.parametrize(
    ("trainer", "data"),
    [(FSDP2, {}), ({}, {}), ({}, {"on_policy": SAMPLED})],
    ids=["sharded", "whole", "whole, on policy"],
)
def test_two_processes_learn_from_a_server_what_one_learns(
    tmp_path: Path, server: Endpoint, trainer: dict[str, Any], data: dict[str, Any]
) -> None:
    training = {"epochs": 2, "optimizer": "sgd", "momentum": 0, "learning_rate": 0.1}
    spec: dict[str, Any] = {
        "job": "distill",
        "run": str(tmp_path / "alone"),
        "teacher": {"endpoint": server.url, "model": "tiny-chat", "k": 8},
        "student": {"model": str(saved(tiny_model(seed=1), tmp_path / "student"))},
        "data": {"train": chats_in(tmp_path, CHATS), **data},
        "training": training | {"batch_size": 4},
        "evaluation": {"samples": 0},
    }
    alone = distill(DistillSpec.model_validate(spec))
    rows = scored(server)
    server.asked.clear()
    spec["training"] = training | {"batch_size": 2, "trainer": trainer}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    words = ["distill", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "both")]
    in_two_processes(tmp_path, run_sharded if trainer else run, words)
    both = Run(tmp_path / "both")
    assert len(logged(both)) == 4
    assert logged(both) == pytest.approx(logged(alone), rel=1e-4)
    assert len({round(loss, 4) for loss in logged(both)}) == 4
    assert scored(server) == rows and len(rows) == 2 * len(CHATS), "each row once in each epoch"
    weights, wanted = (load_file(r.path("model/model.safetensors")) for r in (both, alone))
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
