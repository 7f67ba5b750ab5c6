"""The spec of a short distillation of chats, and the losses of its run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from tests.fixtures.json_lines import write_lines


def chat(number: int) -> dict[str, str]:
    return {"prompt": f"the mat of {number}?", "response": f"the teacher sat {number}"}


CHATS = [chat(n) for n in range(9)]


def chats_in(folder: Path, rows: Iterable[dict[str, Any]] = CHATS) -> dict[str, str]:
    """A source of rows, which are written to a file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "rows.jsonl", rows)
    return {"name": "chat", "path": str(folder / "rows.jsonl")}


def distill_spec(
    folder: Path,
    student: Path | str,
    /,
    *,
    rows: Iterable[dict[str, Any]] = CHATS,
    **changes: Any,
) -> DistillSpec:
    """A spec whose run and rows are in a folder.

    Args:
        folder: The folder.
        student: The student's model.
        rows: The rows of the data.
        **changes: Further fields; those of a mapping are added to the ones here.
    """
    asked: dict[str, Any] = {
        "job": "distill",
        "run": str(folder / "run"),
        "student": {"model": str(student)},
        "data": {"train": chats_in(folder, rows)},
        "training": {"epochs": 2, "batch_size": 2, "accumulation": 2},
        "evaluation": {"samples": 0},
    }
    for name, more in changes.items():
        asked[name] = {**asked.get(name, {}), **more}
    return DistillSpec.model_validate(asked)


def logged(run: Run, name: str = "loss") -> list[float]:
    """A figure of the steps of a run."""
    lines = map(json.loads, run.path("metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if "loss" in line]
