"""What is measured before the training can be left out, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.jobs.evaluate import spec_of as evaluate_spec_of
from kdcore.jobs.preflight import estimates
from kdcore.jobs.preflight import train_drafter as drafter_preflight
from kdcore.reporting.page import report
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.specs.compare import CompareSpec
from kdcore.specs.jobs import JOBS
from kdcore.specs.parts.changes import changed
from kdcore.specs.train_drafter import TrainedSpec
from tests.fixtures.json_lines import write_lines
from tests.kdcore.runs.test_inputs import InterruptedAfter
from tests.tiny.tiny_chat_models import saved, tiny_model

JOBS_THAT_TRAIN = ["distill", "train-drafter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and rows to learn from, to measure and to choose on."""
    folder = tmp_path_factory.mktemp("asked")
    for seed, name in enumerate(("teacher", "student")):
        saved(tiny_model(seed=seed), folder / name)
    for name, word in (("train", "mat"), ("heldout", "student"), ("validation", "target")):
        rows = [{"prompt": f"the {word} {n}?", "response": f"the teacher sat {n}"} for n in (1, 2)]
        write_lines(folder / f"{name}.jsonl", 4 * rows)
    return folder


def spec_of(folder: Path, job: str, run: Path, before: bool, **changes: Any) -> TrainedSpec:
    """Of a run in which dropout, the order of the rows and two gates draw."""
    sources = {
        name: {"name": "chat", "path": str(folder / f"{name}.jsonl")}
        for name in ("train", "heldout", "validation")
    }
    if job == "distill":
        del sources["validation"]
    teacher, student = ({"model": str(folder / name)} for name in ("teacher", "student"))
    of_job: dict[str, Any] = {
        "distill": {
            "teacher": teacher,
            "student": student | {"lora": {"r": 2, "dropout": 0.3}},
            "evaluation": {"samples": 1, "sample_tokens": 3, "answers": ["rouge_l"]}
            | {"answer_tokens": 3},
        },
        "train-drafter": {"target": teacher, "drafter": {"name": "medusa", "depth": 2}},
    }
    asked = {
        "job": job,
        "run": str(run),
        "data": sources | {"responses": {"by": "dataset"}},
        "method": {"gates": [{"name": "random", "rate": 0.6}]},
        "training": {"batch_size": 2, "steps": 4, "eval_every": 2, "save_every": 1},
    }
    spec = JOBS[job].spec.model_validate(asked | of_job[job])
    return changed(spec, {"evaluation": {"before": before}} | changes)  # type: ignore[no-any-return]


def weights(run: Run) -> bytes:
    (file,) = [*run.folder.glob("model/*.safetensors"), *run.folder.glob("drafter/*.safetensors")]
    return file.read_bytes()


def logged(run: Run) -> list[dict[str, float]]:
    lines = map(json.loads, run.path("metrics.jsonl").read_text().splitlines())
    return [{n: value for n, value in line.items() if "second" not in n} for line in lines]


@pytest.mark.parametrize("job", JOBS_THAT_TRAIN)
def test_the_same_is_trained_and_chosen_to_the_bit(folder: Path, tmp_path: Path, job: str) -> None:
    """Also where the untrained drafter is as good as the trained ones: it is none of them."""
    slow = {"training": {"learning_rate": 1e-6}}
    specs = [spec_of(folder, job, tmp_path / str(b), b, **slow) for b in (True, False)]
    with_it, without = (JOBS[job].carry_out(spec) for spec in specs)
    assert weights(with_it) == weights(without)
    assert logged(with_it) == logged(without)
    both, once = (run.read_json("results.json") for run in (with_it, without))
    assert once["before"] == {} and once["after"] == both["after"] != {}
    if job == "train-drafter":
        assert both["after"]["tau"] == both["before"]["tau"], "else this says nothing of a tie"
    assert [sample.keys() - {"prompt"} for sample in once["samples"]] == [
        sample.keys() - {"prompt", "before"} for sample in both["samples"]
    ]
    rows = [run.read_json("heldout_rows.json") for run in (with_it, without)]
    assert rows[0]["after"] == rows[1]["after"] and rows[1]["before"] == {}


@pytest.mark.parametrize("job", JOBS_THAT_TRAIN)
def test_what_was_not_measured_is_shown_nowhere(folder: Path, tmp_path: Path, job: str) -> None:
    run = JOBS[job].carry_out(spec_of(folder, job, tmp_path / "run", False))
    card = run.path("README.md").read_text()
    assert "| held-out | after |\n| --- | --- |\n| " in card and "before" not in card
    metric = run.read_json("results.json")["metrics"][0]
    figure = format(run.read_json("results.json")["after"][metric["name"]], metric["format"])
    assert f"| {metric['title']} | {figure} |" in card
    page = report([run.folder])
    assert ">after</th>" in page and ">before</th>" not in page
    assert "Measured after the training." in page and "change [95" not in page


@pytest.fixture(scope="module", params=JOBS_THAT_TRAIN)
def whole(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Run]:
    """A job, and its run that nothing interrupts and that measures at both ends."""
    place = tmp_path_factory.mktemp("whole") / "run"
    return request.param, JOBS[request.param].carry_out(spec_of(folder, request.param, place, True))


@pytest.mark.parametrize("begun", [True, False])
def test_a_resumed_run_measures_as_its_spec_now_says(
    folder: Path, whole: tuple[str, Run], tmp_path: Path, begun: bool
) -> None:
    """The first measurement is of what the training began with, whenever it is made."""
    job, unbroken = whole
    spec = spec_of(folder, job, tmp_path / "run", begun)
    with pytest.raises(KeyboardInterrupt):
        JOBS[job].carry_out(spec, progress=InterruptedAfter(3))
    assert Run(spec.run).checkpoint() is not None
    spec = spec_of(folder, job, tmp_path / "run", not begun)
    resumed = JOBS[job].carry_out(spec, resume=True)
    assert weights(resumed) == weights(unbroken)
    found, wanted = (run.read_json("results.json") for run in (resumed, unbroken))
    assert found["before"] == ({} if begun else wanted["before"])
    assert resumed.spec()["evaluation"]["before"] is not begun
    spec = spec_of(folder, job, tmp_path / "run", begun)
    with pytest.raises(UserError, match=r"different spec; changed: evaluation\.before"):
        JOBS[job].carry_out(spec, resume=True)
    assert resumed.spec()["evaluation"]["before"] is not begun


def test_a_run_that_measured_nothing_has_begun_all_the_same(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((folder / "train.jsonl").read_text())
    train = {"data": {"train": {"name": "chat", "path": str(rows)}}}
    spec = spec_of(folder, "distill", tmp_path / "run", False, **train)
    with pytest.raises(KeyboardInterrupt):
        JOBS["distill"].carry_out(spec, progress=InterruptedAfter(3))
    rows.write_text(rows.read_text().replace("mat", "cat"))
    with pytest.raises(OtherInput, match=r"the rows of data\.train changed"):
        JOBS["distill"].carry_out(spec, resume=True)


@pytest.mark.parametrize("job", JOBS_THAT_TRAIN)
def test_a_comparison_measures_once_unless_it_says_otherwise(
    folder: Path, tmp_path: Path, job: str
) -> None:
    base = spec_of(folder, job, tmp_path / "run", True).model_dump(mode="json")
    said = base["evaluation"].pop("before")
    arms = {"plain": {}, "twice": {"evaluation": {"before": True}}}

    def compared(base: Any) -> CompareSpec:
        return CompareSpec.model_validate({"job": "compare", "base": base, "arms": arms})

    for given in (base, JOBS[job].spec.model_validate(base)):
        spec = compared(given)
        assert spec.base.evaluation.before is False
        assert CompareSpec.model_validate(spec.model_dump(mode="json")) == spec
        twice = changed(spec.base, spec.arms["twice"])
        assert twice.evaluation.before is True
    base["evaluation"]["before"] = said
    assert compared(base).base.evaluation.before is True


def test_a_student_is_measured_again_by_what_its_run_measured(folder: Path, tmp_path: Path) -> None:
    run = JOBS["distill"].carry_out(spec_of(folder, "distill", tmp_path / "run", False))
    asked = evaluate_spec_of(run)
    again = JOBS["evaluate"].carry_out(JOBS["evaluate"].spec.model_validate(asked))
    assert again.figures["rouge_l"] == run.read_json("results.json")["after"]["rouge_l"]


@pytest.mark.parametrize("job", JOBS_THAT_TRAIN)
def test_the_estimate_counts_the_measurements(
    folder: Path, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice on the way, at the end, at the beginning if it is asked; of a drafter on two sets."""
    for module in (estimates, drafter_preflight):
        monkeypatch.setattr(module, "throughput", lambda *_, **__: 1.0)
    both, once = (
        JOBS[job].look_ahead(spec_of(folder, job, tmp_path / "run", b)).seconds["measuring"]
        for b in (True, False)
    )
    assert both / once == pytest.approx(4 / 3 if job == "distill" else 5 / 4)
