"""The best student by a held-out figure is saved, and a training without a gain stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.evaluation.heldout import HeldOut
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import evaluate, spec_of
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.training.trainer.figures import StopWithoutGain
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


def rows(path: Path, words: str, count: int) -> dict[str, Any]:
    made = [{"prompt": f"{words} {n}?", "response": f"sat {n}"} for n in range(count)]
    write_lines(path, made)
    return {"name": "chat", "path": str(path)}


def asked(folder: Path, teacher: Path, training: dict[str, Any], **changes: Any) -> DistillSpec:
    spec: dict[str, Any] = {
        "run": folder / "run",
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": {
            "train": rows(folder / "train.jsonl", "the mat of", 8),
            "heldout": rows(folder / "heldout.jsonl", "the student of", 3),
        },
        "training": {"batch_size": 4, "learning_rate": 0.1, "schedule": "constant", "warmup": 0}
        | {"steps": 10, "eval_every": 2, "keep_best": "perplexity"}
        | training,
        "method": {},
        "evaluation": {"samples": 0, "before": False, "answer_tokens": 3},
    }
    for name, value in changes.items():
        spec[name] |= value
    return DistillSpec.model_validate(spec)


def measured(run: Run, figure: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[f"eval_{figure}"]) for line in lines if f"eval_{figure}" in line]


def test_the_best_student_is_saved(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    measure = HeldOut.measure
    monkeypatch.setattr(HeldOut, "measure", lambda *a: times.append(1) or measure(*a))
    # the labels lead away from the teacher
    labels = {"terms": {"task": 1, "kd": 0}}
    run = distill(asked(tmp_path, teacher, {"keep_best": "teacher_kl"}, method=labels))
    assert len(times) == 5 + 1, "each evaluation once, and the best student"
    found = measured(run, "teacher_kl")
    best, value = min(found, key=lambda each: each[1])
    assert best < 10 and value < found[-1][1]
    results = run.read_json("results.json")
    assert results["after"]["teacher_kl"] == pytest.approx(value)
    again = evaluate(EvaluateSpec.model_validate(spec_of(run)))
    assert again.figures["teacher_kl"] == pytest.approx(value), "what is saved"
    assert results["kept_by"] == "teacher_kl on data.heldout, the rows that are reported"
    assert results["kept_by_these_rows"] is True
    assert "the best evaluated state by teacher_kl" in run.path("README.md").read_text()


def test_a_training_without_a_gain_stops_and_a_score_may_choose(
    tmp_path: Path, teacher: Path
) -> None:
    training = {"steps": 40, "keep_best": "rouge_l", "patience": 2}
    validation = {"validation": rows(tmp_path / "validation.jsonl", "the teacher of", 2)}
    scores = {"answers": ["rouge_l", "exact_match"]}
    run = distill(asked(tmp_path, teacher, training, data=validation, evaluation=scores))
    found = measured(run, "rouge_l")
    values = [value for _, value in found]
    best = values.index(max(values))
    assert len(found) == best + 3 and found[-1][0] == 2 * len(found) < 40
    results = run.read_json("results.json")
    assert results["kept_by"] == "rouge_l on data.validation"
    assert results["kept_by_these_rows"] is False
    assert {"rouge_l", "exact_match"} <= results["after"].keys()
    kept = json.loads(run.path("heldout_rows.json").read_text())["after"]
    assert len(kept["scores"]["rouge_l"]) == 3, "of the held-out rows"


@pytest.mark.parametrize(
    ("better", "values", "stops"),
    [
        ("lower", [3.0, 2.0, 2.0], False),
        ("lower", [3.0, 2.0, 2.0, 2.5], True),
        ("higher", [1.0, 2.0, 1.0, 3.0], False),
        ("higher", [3.0, 1.0, 2.0], True),
        ("lower", [], False),
    ],
)
def test_a_resumed_training_stops_where_it_would_have(
    better: str, values: list[float], stops: bool
) -> None:
    """A checkpoint has the log of the evaluations, and nothing else is read."""
    log = [entry for value in values for entry in ({"loss": 1.0}, {"eval_x": value})]
    for event in ("on_train_begin", "on_evaluate"):
        control = SimpleNamespace(should_training_stop=False)
        callback = StopWithoutGain("x", better, patience=2)
        getattr(callback, event)(None, SimpleNamespace(log_history=log), control)
        assert control.should_training_stop is stops


@pytest.mark.parametrize(
    ("training", "changes", "said"),
    [
        ({"eval_every": None}, {}, "keep_best reads the evaluations during the training"),
        ({"keep_best": None, "patience": 1}, {}, "patience needs a figure"),
        ({"keep_best": None}, {"data": {"validation": "digits"}}, "keep_best: set both"),
        ({"keep_best": "perplexty"}, {}, "unknown figure 'perplexty'"),
        ({"keep_best": "rouge_l"}, {}, "the score rouge_l is not measured"),
        (
            {},
            {"data": {"validation": {"name": "chat", "path": "heldout.jsonl"}}},
            "uses the same rows as data.heldout",
        ),
    ],
)
def test_what_cannot_choose_is_refused(
    tmp_path: Path, teacher: Path, training: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    if isinstance(changes.get("data", {}).get("validation"), dict):
        changes["data"]["validation"]["path"] = str(tmp_path / "heldout.jsonl")
    with pytest.raises((UserError, ValidationError), match=said):
        distill(asked(tmp_path, teacher, training, **changes))


def test_a_figure_of_the_teacher_needs_a_live_one(tmp_path: Path, teacher: Path) -> None:
    spec = asked(tmp_path, teacher, {"keep_best": "teacher_kl"}).model_dump(mode="json")
    alone = {"teacher": None, "student": {"model": str(teacher)}}
    method = {"method": {"terms": {"task": 1, "kd": 0}}}
    with pytest.raises(UserError, match="compares the student with a live teacher"):
        distill(DistillSpec.model_validate(spec | alone | method))
