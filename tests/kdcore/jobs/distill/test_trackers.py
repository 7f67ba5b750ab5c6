"""A tracker is told what the framework measures, by transformers' own integration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import integration_utils

from kdcore.jobs.train_drafter import train_drafter
from tests.kdcore.jobs.train_drafter.test_train_drafter import REGISTRY, spec_of
from tests.tiny.tiny_chat_models import saved, tiny_model

STEPS = 2


class Writer:
    """TensorBoard's, which remembers instead of writing."""

    def __init__(self, log_dir: str) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.folder = Path(log_dir)
        written.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append((step, value))

    def add_text(self, name: str, text: str) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


written: list[Writer] = []


def test_tensorboard_has_losses_rates_and_held_out_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake: Any = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    target = saved(tiny_model(), tmp_path / "target")
    training = {"steps": STEPS, "batch_size": 4, "report_to": ["tensorboard"], "eval_every": 1}
    run = train_drafter(spec_of(tmp_path, target, training=training), registry=REGISTRY)
    (writer,) = written
    assert writer.folder.is_relative_to(run.folder)
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "term/kd", "acceptance/discount"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in logged] == [1, 2]
        assert writer.scalars[f"train/{name}"] == logged
    assert [step for step, _ in writer.scalars["eval/tau"]] == [1, 2]
    assert {"eval/tau_tree", "eval/level_1"} <= writer.scalars.keys()
