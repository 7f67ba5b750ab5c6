"""What each job does on an accelerator: nothing is left on the CPU.

The mock device raises where a tensor of the CPU meets one of its own, so that a job that ends has
left none there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.components.registry import installed
from kdcore.data.rows import batch_of, collate, padding
from kdcore.decoding.drafters.files import save_drafter
from kdcore.jobs.bench import bench
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import evaluate
from kdcore.jobs.generate_data import generate_data
from kdcore.jobs.train_drafter import train_drafter
from kdcore.method.records import Row
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.runs.progress import Silent
from kdcore.specs.bench import BenchSpec
from kdcore.specs.distill import DistillSpec
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.views import StudentView
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.device.mock_device import DEVICE, MockDevice
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import chat, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

ROWS = [chat(n) for n in range(6)]
TRAINING = {"batch_size": 2, "steps": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        saved(tiny_model(seed=seed), folder / name)
    return folder


def source(folder: Path, count: int = len(ROWS)) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    write_lines(path, ROWS)
    return {"name": "chat", "path": str(path), "limit": count}


def valid(model: Any, asked: dict[str, Any]) -> Any:
    return model.model_validate(asked, context={"registry": installed()})


def distilling(folder: Path, models: Path, **changes: Any) -> DistillSpec:
    asked: dict[str, Any] = {
        "job": "distill",
        "run": str(folder / "run"),
        "teacher": {"model": str(models / "teacher")},
        "student": {"model": str(models / "student")},
        "data": {"train": source(folder), "heldout": source(folder, 2)}
        | {"responses": {"by": "dataset"}},
        "training": TRAINING,
        "evaluation": {"before": False, "samples": 1, "sample_tokens": 3}
        | {"answers": ["rouge_l"], "answer_tokens": 3},
    }
    asked["data"] |= changes.pop("data", {})
    asked["training"] = TRAINING | changes.pop("training", {})
    return valid(DistillSpec, asked | changes)  # type: ignore[no-any-return]


def refuse_work_of_the_cpu(device: MockDevice) -> None:
    assert device.operations
    assert not device.left_on_cpu


def drafting(folder: Path, models: Path, drafter: dict[str, Any], **data: Any) -> TrainDrafterSpec:
    asked = {
        "job": "train-drafter",
        "run": str(folder / "drafter"),
        "target": {"model": str(models / "teacher")},
        "drafter": drafter,
        "data": {"train": source(folder), "heldout": source(folder, 2), **data}
        | {"responses": {"max_new_tokens": 6}},
        "training": TRAINING,
    }
    return valid(TrainDrafterSpec, asked)  # type: ignore[no-any-return]


METHODS: dict[str, dict[str, Any]] = {
    "sft": {"teacher": None, "method": {"terms": {"task": 1, "kd": 0}, "gates": []}},
    "kd": {
        "method": {"gates": []},
        "training": {"eval_every": 1, "save_every": 1, "probe_every": 1, "probe_batches": 2},
    },
    "speckd": {"method": {"gates": [{"name": "speckd", "verification": "sampling"}]}},
    "deepkd": {
        "method": {"gates": [], "splitters": [{"name": "deepkd"}], "momentum": {"name": "deepkd"}}
        | {"terms": {"task": 1, "target": 1, "non_target": 1}},
        "training": {"optimizer": "sgd", "momentum": 0, "clip": 0},
    },
    "ranked": {"method": {"gates": [{"name": "student_entropy"}]}},
    "remembered": {"method": {"gates": [{"name": "se_kd_queue"}]}},
    "matched": {"method": {"matchers": ["attention", "hidden"]}},
    "stateful": {"method": {"divergence": {"name": "taid"}}},
    "adapters": {"student": {"lora": {"r": 2, "dropout": 0.1}}},
    "on policy": {
        "data": {"on_policy": {"policy": "interleaved", "probability": 1, "max_new_tokens": 3}},
    },
    "policy gradient": {
        "data": {"on_policy": {"policy": "mixed", "probability": 1, "max_new_tokens": 3}},
        "method": {"advantage": "minillm"},
    },
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS.keys())
def test_a_student_is_trained_on_the_device(
    device: MockDevice, tmp_path: Path, models: Path, changes: dict[str, Any]
) -> None:
    run = distill(distilling(tmp_path, models, **dict(changes)))
    assert all(math.isfinite(loss) for loss in logged(run))
    assert device.pinned, "the batches are copied from memory that the device cannot read"
    refuse_work_of_the_cpu(device)


def test_a_teacher_on_another_device_teaches(
    device: MockDevice, tmp_path: Path, models: Path
) -> None:
    """The teacher on the CPU, the student on the device: tensors of the two must not meet."""
    sampled = {"policy": "interleaved", "probability": 0.5, "max_new_tokens": 3}
    asked: dict[str, Any] = {
        "teacher": {"model": str(models / "teacher"), "device": "cpu"},
        "data": {"on_policy": sampled},
        "method": {"gates": ["speckd"], "terms": {"feature": 0.1}}
        | {"matchers": ["attention", "hidden"]},
    }
    run = distill(distilling(tmp_path, models, **asked))
    assert all(math.isfinite(loss) for loss in logged(run))
    assert sum(device.left_on_cpu.values()) > 100  # the teacher's own work


def test_the_logits_of_a_teacher_on_another_device(device: MockDevice, models: Path) -> None:
    teacher = load_model(ModelSpec(model=str(models / "teacher"), device="cpu"))
    teacher.to(DEVICE)  # it stays
    student = load_model(ModelSpec(model=str(models / "student")))
    student.to(DEVICE)
    view = StudentView(
        student.model, teacher.classes, LiveTeacher.of(teacher.model, teacher.classes)
    )
    tokens = torch.arange(3, 9)
    row = Row(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens, tokens > 4, "row"
    )
    padded = collate([(0, row)], padding(teacher.tokenizer))
    here = view.teacher(batch_of(padded))
    there: Any = view.teacher(batch_of(padded, DEVICE))
    assert there.logits(slice(0, 3)).device == there.features.device == DEVICE
    assert torch.equal(there.logits(slice(0, 3)).cpu(), here.logits(slice(0, 3)))


def test_a_student_is_trained_on_the_device_by_a_cache(
    device: MockDevice, tmp_path: Path, models: Path
) -> None:
    spec = distilling(tmp_path, models)
    build_cache(spec, tmp_path / "cache", k=4)
    cached = {"data": {"teacher_cache": str(tmp_path / "cache")}, "method": {"gates": []}}
    run = distill(distilling(tmp_path, models, **cached))
    assert all(math.isfinite(loss) for loss in logged(run))
    refuse_work_of_the_cpu(device)


DRAFTERS: dict[str, dict[str, Any]] = {
    "fasteagle": {"depth": 2, "vocabulary": 40},
    "eagle3": {"depth": 2, "vocabulary": 40},
    "medusa": {"depth": 2, "vocabulary": 40},
}


@pytest.mark.parametrize(("name", "params"), DRAFTERS.items(), ids=DRAFTERS.keys())
def test_a_drafter_is_trained_on_the_device(
    device: MockDevice,
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    params: dict[str, Any],
) -> None:
    monkeypatch.setattr("kdcore.jobs.train_drafter.REPLAYED", 6)  # the device is slow
    run = train_drafter(drafting(tmp_path, models, {"name": name, **params}))
    assert run.read_json("results.json")["after"]["tau"] >= 1
    assert json.loads(run.path("replay.json").read_text())
    refuse_work_of_the_cpu(device)


@pytest.fixture(scope="module")
def drafter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained one."""
    loaded = load_model(ModelSpec.model_validate({"model": str(models / "teacher")}))
    choice: Any = valid(DraftingSpec, {"drafter": {"name": "fasteagle", "depth": 2}}).drafter
    made = Assembly(installed()).build(choice)
    made.bind(loaded.model, loaded.tokenizer)
    folder = tmp_path_factory.mktemp("drafter")
    save_drafter(folder, made, choice, loaded, installed())
    return folder


def test_text_is_generated_on_the_device(
    device: MockDevice, models: Path, drafter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, short = str(models / "teacher"), ["--max-new-tokens", "4"]
    sampled = ["--temperature", "1", "--top-p", "0.9"]
    for options in ([], ["--drafter", str(drafter)], ["--drafter", str(drafter), *sampled]):
        device_line, answer = said(capsys, "generate", target, "the mat?", *options, *short)
        assert device_line == f"device: {DEVICE.type}"
        assert answer
    refuse_work_of_the_cpu(device)


def test_a_drafter_is_examined_on_the_device(
    device: MockDevice, models: Path, drafter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "the mat?", "--max-new-tokens", "4", "--json"]
    words = ["doctor", str(drafter), str(models / "teacher"), *options]
    device_line, found = said(capsys, *words, codes=(0, 1))  # an untrained one predicts nothing
    assert device_line == f"device: {DEVICE.type}"
    verdicts = {each["check"]: each["verdict"] for each in json.loads(found)}
    assert verdicts["features"] == verdicts["proposals"] == verdicts["target"] == "fine"
    assert verdicts["output"] != "wrong"
    refuse_work_of_the_cpu(device)


def said(
    capsys: pytest.CaptureFixture[str], *words: str, codes: tuple[int, ...] = (0,)
) -> tuple[str, str]:
    """The first line on stderr of a command, and what it wrote to stdout."""
    console.out.cache_clear()
    console.err.cache_clear()
    capsys.readouterr()
    found = main.run(list(words))
    out, err = capsys.readouterr()
    assert found in codes, err
    return err.splitlines()[0], out


def test_a_model_is_measured_on_the_device(
    device: MockDevice, tmp_path: Path, models: Path
) -> None:
    asked = {
        "job": "evaluate",
        "model": {"model": str(models / "student")},
        "teacher": {"model": str(models / "teacher")},
        "heldout": source(tmp_path, 2),
        "evaluation": {"samples": 1, "sample_tokens": 3},
    }
    assert math.isfinite(evaluate(valid(EvaluateSpec, asked)).figures["teacher_kl"])
    refuse_work_of_the_cpu(device)


def test_decoding_is_measured_on_the_device(
    device: MockDevice, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcore.decoding.trials.round_cost.REPEATS", 1)
    drafter = {"name": "model", "model": str(models / "student"), "length": 2}
    asked = {
        "job": "bench",
        "run": str(tmp_path / "bench"),
        "target": {"model": str(models / "teacher")},
        "methods": {"small": {"drafter": drafter}, "ngram": {"drafter": "ngram"}},
        "baselines": ["generate", {"name": "assisted", "model": str(models / "student")}],
        "sets": {"rows": source(tmp_path, 1)},
        "limit": 1,
        "max_new_tokens": 4,
    }
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    run = bench(valid(BenchSpec, asked), progress=progress)
    assert notes[0] == f"device: {DEVICE.type}"
    decodings = 5 * 2  # methods, and each once to warm up
    assert device.synchronised == 2 * decodings, "the clock is read before the device is done"
    assert run.read_json("bench.json")
    refuse_work_of_the_cpu(device)


def test_answers_are_generated_on_the_device(
    device: MockDevice, tmp_path: Path, models: Path
) -> None:
    asked = {
        "job": "generate-data",
        "run": str(tmp_path / "answers"),
        "teacher": {"model": str(models / "teacher")},
        "source": source(tmp_path, 2),
        "responses": {"max_new_tokens": 3, "temperature": 1.0},
    }
    generate_data(valid(GenerateDataSpec, asked))
    refuse_work_of_the_cpu(device)


def test_a_device_without_float64_trains_measures_resumes_and_samples(
    device_without_float64: MockDevice,
    tmp_path: Path,
    models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = METHODS["deepkd"]["training"] | {"probe_every": 1, "probe_batches": 2}
    changes = METHODS["deepkd"] | {"training": training | {"save_every": 1, "steps": 1}}
    distill(distilling(tmp_path, models, **changes))
    (tmp_path / "run" / "README.md").unlink()  # not finished: it goes on from the checkpoint
    run = distill(distilling(tmp_path, models, **changes), resume=True)
    assert all(math.isfinite(loss) for loss in logged(run))
    sampled = ["--temperature", "1", "--max-new-tokens", "4"]
    said(capsys, "generate", str(models / "teacher"), "the mat?", *sampled)


def test_several_devices_and_one_process_use_one(
    device: MockDevice, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would wrap the model in DataParallel, whose replicas the view does not know."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # what the Trainer asks
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    distill(distilling(tmp_path, models, training={"steps": 1}), progress=progress)
    assert "accelerate launch --num_processes 2 -m kdcore_cli distill SPEC" in notes[0]
    refuse_work_of_the_cpu(device)


def test_a_drafter_that_is_bound_on_the_device_has_the_dtype_of_its_weights(
    device: MockDevice, models: Path
) -> None:
    target = load_model(ModelSpec.model_validate({"model": str(models / "teacher")}))
    target.model.to(DEVICE)
    choice: Any = valid(DraftingSpec, {"drafter": {"name": "fasteagle", "depth": 1}}).drafter
    drafter = Assembly(installed()).build(choice)
    drafter.bind(target.model, target.tokenizer)
    drafter.to(torch.bfloat16)
    assert drafter.dtype == torch.bfloat16
