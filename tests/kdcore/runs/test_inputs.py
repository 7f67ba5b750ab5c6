"""A resumed run reads what the one begun read, or is refused before anything is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.runs.inputs import OtherInput
from kdcore.runs.progress import Silent
from kdcore.specs.jobs import JOBS
from kdcore.specs.parts.fields import SpecModel
from tests.tiny.tiny_chat_models import saved, tiny_model


class InterruptedAfter(Silent):
    """Interrupts the training when so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Any]:
        made: list[int] = []

        def advance(steps: int = 1, **figures: float) -> None:
            made.append(steps)
            if name == "train" and len(made) > self.steps:
                raise KeyboardInterrupt

        yield SimpleNamespace(advance=advance)


def lines(word: str) -> str:
    rows = [{"prompt": f"the mat of {n}?", "response": f"the {word} sat {n}"} for n in range(8)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def spec_of(folder: Path, job: str) -> SpecModel:
    (folder / "rows.jsonl").write_text(lines("teacher"))
    models = {
        name: {"model": str(saved(tiny_model(seed=seed), folder / name))}
        for seed, name in enumerate(("target", "teacher", "student"))
    }
    of_job = {
        "distill": {name: models[name] for name in ("teacher", "student")},
        "train-drafter": {"target": models["target"], "drafter": {"name": "medusa", "depth": 2}},
    }
    asked = {
        "job": job,
        "run": str(folder / "run"),
        "data": {
            "train": {"name": "chat", "path": str(folder / "rows.jsonl")},
            "responses": {"by": "dataset"},
        },
        "training": {"batch_size": 4, "steps": 4, "save_every": 1},
    }
    return JOBS[job].spec.model_validate(asked | of_job[job])


@pytest.mark.parametrize(
    ("job", "what", "place"),
    [
        ("distill", "the rows of data.train", "rows.jsonl"),
        ("distill", "the teacher", "teacher"),
        ("distill", "the student", "student"),
        ("train-drafter", "the rows of data.train", "rows.jsonl"),
        ("train-drafter", "the target", "target"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(
    tmp_path: Path, job: str, what: str, place: str
) -> None:
    spec, path = spec_of(tmp_path, job), tmp_path / place

    def put(changed: bool) -> None:
        if place == "rows.jsonl":
            path.write_text(lines("student" if changed else "teacher"))
        else:
            seed = ("target", "teacher", "student").index(place)
            saved(tiny_model(seed=9 if changed else seed), path)

    with pytest.raises(KeyboardInterrupt):
        JOBS[job].carry_out(spec, progress=InterruptedAfter(2))
    kept = {p: p.read_bytes() for p in (tmp_path / "run").glob("checkpoint-*/*.safetensors")}
    assert kept
    put(changed=True)
    with pytest.raises(OtherInput, match=f"{what} changed since .*\nrestore the original"):
        JOBS[job].carry_out(spec, resume=True)
    assert {p: p.read_bytes() for p in kept} == kept
    put(changed=False)
    assert JOBS[job].carry_out(spec, resume=True).finished


def test_a_run_that_measured_nothing_takes_what_is_there(tmp_path: Path) -> None:
    """Its first attempt may have failed because of what was there."""
    spec = spec_of(tmp_path, "distill")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the mat?"}\n')
    with pytest.raises(UserError, match="lacks a response to train on"):
        JOBS["distill"].carry_out(spec)
    assert json.loads((tmp_path / "run/run.json").read_text())["inputs"], "what it had read by then"
    (tmp_path / "rows.jsonl").write_text(lines("teacher"))
    saved(tiny_model(seed=9), tmp_path / "teacher")
    assert JOBS["distill"].carry_out(spec, resume=True).finished
