"""What works with what: method x sharding x teacher, as docs/howto/processes.md tabulates it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from pydantic import ValidationError

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.training import arguments
from kdcore.training.method import Method

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "processes.md"
TEACHERS: dict[str, dict[str, Any]] = {
    "whole": {},
    "`device: cuda:1` or `auto`": {"device": "auto"},
    "`device: sharded`": {"device": "sharded"},
    "cached": {},
    "behind an `endpoint`": {"endpoint": "http://localhost:8000/v1"},
}
MOMENTA = {
    "method": {"splitters": ["deepkd"], "momentum": "deepkd", "terms": {"task": 1}},
    "training": {"optimizer": "sgd", "momentum": 0, "clip": 0},
}
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
WANTED: dict[str, dict[str, Any]] = {
    "one backward pass (`momentum: shared`)": {},
    "several momenta (`deepkd`, `dot`, `per_term`)": MOMENTA,
    "`data.on_policy`, policy `student`": {"data": {"on_policy": {"policy": "student"}}},
    "`data.on_policy`, policy `interleaved`": {"data": {"on_policy": {"policy": "interleaved"}}},
    "`data.on_policy`, policy `mixed`": {"data": {"on_policy": {"policy": "mixed"}}},
    "`data.responses.by: teacher`": {"data": {"responses": {"by": "teacher"}}},
    "`training.probe_every`": {"training": {"probe_every": 2}},
    "`student.lora`": {"student": {"model": "s", "lora": {"r": 2}}},
    "`student.lora` with `student.quantization`": {
        "student": {"model": "s", "lora": {"r": 2}, "quantization": QUANTISED}
    },
}
PLAIN: dict[str, Any] = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"train": {"name": "chat", "path": "rows.jsonl"}},
}
SHARDINGS: dict[str, dict[str, Any]] = {"DDP": {}, "FSDP": {"trainer": {"fsdp": True}}}


def works(folder: Path, wanted: dict[str, Any], teacher: str, sharding: dict[str, Any]) -> bool:
    """Whether the spec of a combination is accepted, which a run then carries out."""
    data = {"train": {"name": "chat", "path": "rows.jsonl"}} | wanted.get("data", {})
    if teacher == "cached":
        data["teacher_cache"] = str(folder)
    asked = {"student": {"model": "s"}} | wanted
    asked["teacher"] = {"model": "t"} | TEACHERS[teacher]
    asked |= {"data": data, "training": wanted.get("training", {}) | sharding}
    try:
        spec = DistillSpec.model_validate(asked)
        Method.build(spec, Assembly(installed()), Run(folder / "run", planned=True))
    except (ValidationError, UserError) as refusal:
        assert "; fix:" not in str(refusal)
        return False
    return True


def table(folder: Path) -> str:
    """The table of the page, in Markdown."""
    lines = ["| | " + " | ".join(f"teacher {name}" for name in TEACHERS) + " |"]
    lines += ["|" + " --- |" * (1 + len(TEACHERS))]
    for name, wanted in WANTED.items():
        cells = []
        for teacher in TEACHERS:
            able = [s for s, how in SHARDINGS.items() if works(folder, wanted, teacher, how)]
            cells.append(", ".join(able) or "no")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are two processes, on accelerators."""
    place = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(arguments, "processes", lambda spec: place)


@pytest.mark.usefixtures("several")
def test_the_page_says_what_works_with_what(tmp_path: Path) -> None:
    assert table(tmp_path) in PAGE.read_text("utf-8")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("by_launcher", [False, True])
def test_the_first_fsdp_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_launcher: bool
) -> None:
    asked = dict(PLAIN)
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        asked["training"] = {"trainer": {"fsdp": True, "fsdp_config": {"version": 1}}}

    def build() -> None:
        Method.build(
            DistillSpec.model_validate(asked),
            Assembly(installed()),
            Run(tmp_path / "r", planned=True),
        )

    with pytest.raises(UserError, match="FSDP version 1 is not supported"):
        build()
    if by_launcher:
        monkeypatch.setenv("FSDP_VERSION", "2")
    else:
        asked["training"]["trainer"]["fsdp_config"]["version"] = 2
    build()


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("by_launcher", [False, True])
def test_deepspeed_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_launcher: bool
) -> None:
    asked = dict(PLAIN)
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    else:
        asked["training"] = {"trainer": {"deepspeed": {"zero_optimization": {"stage": 3}}}}
    with pytest.raises(UserError, match="DeepSpeed is not supported") as caught:
        Method.build(
            DistillSpec.model_validate(asked),
            Assembly(installed()),
            Run(tmp_path / "r", planned=True),
        )
    assert "training.trainer.fsdp: true" in caught.value.cure
