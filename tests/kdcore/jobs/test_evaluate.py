"""Any model measured: alone, beside a teacher, as a run's student, by lm-eval's tasks."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import Evaluation, evaluate, spec_of
from kdcore.specs.evaluate import EvaluateSpec
from kdcore_cli import main
from tests.fixtures.json_lines import write_lines
from tests.kdcore.jobs.distill.test_distill import classifier_of
from tests.kdcore.jobs.distill.test_distill import spec_of as distill_spec
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {str(s): str(saved(tiny_model(seed=s), folder / f"seed-{s}")) for s in (0, 1)}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [{"question": f"the mat of {n}?", "answer": f"sat {n}\n#### {n}"} for n in range(5)]
    return write_lines(tmp_path / "rows.jsonl", made)


def measured(**fields: Any) -> Evaluation:
    return evaluate(EvaluateSpec.model_validate({"job": "evaluate"} | fields))


def test_a_model_alone_and_beside_a_teacher(models: dict[str, str], rows: Path) -> None:
    asked: dict[str, Any] = {
        "model": {"model": models["1"]},
        "heldout": {"name": "chat", "path": str(rows)},
        "evaluation": {"samples": 1, "sample_tokens": 3},
    }
    alone = measured(**asked)
    assert alone.figures.keys() == {"perplexity", "accuracy"}
    assert alone.teacher is None and alone.samples[0].keys() == {"prompt", "model"}
    judged = {"answers": ["rouge_l", "exact_match"], "answer_tokens": 6, "samples": 0}
    beside = measured(**asked | {"teacher": {"model": models["0"]}, "evaluation": judged})
    for name, value in alone.figures.items():
        assert beside.figures[name] == pytest.approx(value)
    assert beside.figures["teacher_kl"] > 0.1 and beside.figures["agreement"] < 1
    assert beside.rows is not None and len(beside.rows.scores["exact_match"]) == 5
    names = [metric.name for metric in beside.metrics]
    assert names[-2:] == ["rouge_l", "exact_match"] and set(names) == beside.figures.keys()
    itself = measured(**asked | {"teacher": {"model": models["1"]}})
    assert itself.figures["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert itself.figures["agreement"] == 1 and itself.samples[0]["model"]
    assert itself.samples[0]["model"] == itself.samples[0]["teacher"]


@pytest.mark.parametrize("extra", [0, 40])
def test_a_model_has_the_same_perplexity_beside_any_teacher(
    models: dict[str, str], rows: Path, tmp_path: Path, extra: int
) -> None:
    """It is of all its classes, also where the two are compared on fewer."""
    wide = str(saved(tiny_model(seed=2, extra=20), tmp_path / "wide"))
    teacher = str(saved(tiny_model(seed=3, extra=extra), tmp_path / "teacher"))
    asked: dict[str, Any] = {
        "model": {"model": wide},
        "heldout": {"name": "chat", "path": str(rows)},
        "evaluation": {"samples": 0},
    }
    alone, beside = measured(**asked), measured(**asked | {"teacher": {"model": teacher}})
    for name, value in alone.figures.items():
        assert beside.figures[name] == pytest.approx(value)
    assert 0 < beside.figures["acceptance"] < 1 and beside.figures["teacher_kl"] > 0


def test_a_runs_student_is_measured_as_the_run_did(
    tmp_path: Path, models: dict[str, str], rows: Path
) -> None:
    source = {"name": "chat", "path": rows}
    data = {
        "train": source,
        "heldout": source | {"limit": 3},
        "responses": {"by": "teacher", "max_new_tokens": 5},
    }
    run = distill(distill_spec(tmp_path, Path(models["0"]), data))
    again = measured(**spec_of(run))
    for name, value in run.read_json("results.json")["after"].items():
        if not name.startswith("gate/"):
            assert again.figures[name] == pytest.approx(value, rel=1e-5), name
    told = run.read_json("results.json")["samples"]
    assert [(each["prompt"], each["after"]) for each in told] == [
        (each["prompt"], each["model"]) for each in again.samples
    ]
    run.path("model", "config.json").unlink()
    with pytest.raises(UserError, match="does not contain a trained student"):
        spec_of(run)
    run.path("spec.yaml").write_text("job: train-drafter\n")
    with pytest.raises(UserError, match="is a run of train-drafter, and only a run of distill"):
        spec_of(run)
    run.path("spec.yaml").unlink()
    with pytest.raises(UserError, match=r"spec\.yaml is missing"):
        spec_of(run)


def test_a_copy_of_a_runs_student_is_measured_by_the_command_that_export_prints(
    tmp_path: Path, models: dict[str, str], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the run's held-out rows: those of `heldout: 10 %` are in no file of their own."""
    data = {"train": {"name": "chat", "path": rows}, "heldout": "40 %"}
    training = {"steps": 1, "batch_size": 2}
    run = distill(distill_spec(tmp_path, Path(models["0"]), data, training=training))
    capsys.readouterr()
    words = [str(run.folder), "--format", "transformers", "--out", str(tmp_path / "a copy")]
    assert main.run(["export", *words]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    told, _, command = line.partition(": ")
    assert told == "measure it again"
    assert main.run([*shlex.split(command)[1:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"]["name"] == str(run.path("model"))
    assert found["model"]["name"] == str(tmp_path / "a copy")
    assert found["figures"]["teacher_kl"] == pytest.approx(0, abs=1e-6)
    after = run.read_json("results.json")["after"]
    assert found["figures"]["perplexity"] == pytest.approx(after["perplexity"])


def test_a_classifier_is_measured_by_its_labels(tmp_path: Path) -> None:
    texts = [f"the mat {n},{'sat' if n % 2 else 'stood'}" for n in range(4)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(texts) + "\n")
    model = {"model": str(classifier_of(["sat", "stood"], tmp_path / "model"))}
    source = {"name": "labelled_text", "path": str(tmp_path / "rows.csv")}
    found = measured(model=model, heldout=source)
    assert found.figures["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(UserError, match="is not a conversation"):
        measured(model=model, heldout=source, evaluation={"answers": ["rouge_l"]})


def test_what_measures_nothing_is_refused(models: dict[str, str]) -> None:
    for fields in ({}, {"lm_eval": ["any"], "teacher": {"model": "b"}}):
        with pytest.raises(ValidationError, match="heldout"):
            measured(model={"model": "a"}, **fields)


def test_lm_eval_gets_the_loaded_model(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a stand-in: the real one needs a hub for its data."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**asked: Any) -> Any:
        if asked["tasks"] == ["nothing"]:
            raise KeyError("nothing")
        seen.update(asked)
        return {"results": {"tiny": {"alias": "tiny", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}

    made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models")}
    made["lm_eval.evaluator"] = ModuleType("lm_eval.evaluator")
    made["lm_eval.models.huggingface"] = ModuleType("lm_eval.models.huggingface")
    vars(made["lm_eval.evaluator"])["simple_evaluate"] = simple_evaluate
    vars(made["lm_eval.models.huggingface"])["HFLM"] = lambda **given: given
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = measured(model={"model": models["0"]}, lm_eval=["tiny"])
    assert found.lm_eval == {"tiny": {"acc,none": 0.5}} and found.rows is None
    assert seen["tasks"] == ["tiny"] and seen["model"]["batch_size"] == 8
    assert seen["model"]["pretrained"].config.vocab_size == 290
    assert seen["model"]["tokenizer"].eos_token == "<|im_end|>"
    with pytest.raises(UserError, match="lm-eval cannot run nothing: KeyError"):
        measured(model={"model": models["0"]}, lm_eval=["nothing"])


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="requires the package lm-eval, which is not"):
        measured(model={"model": "never/loaded"}, lm_eval=["tiny"])
