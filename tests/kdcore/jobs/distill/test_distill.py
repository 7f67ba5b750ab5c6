"""From a spec to a run folder: a cut of a teacher, adapters, and a classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.evaluate import evaluate
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.loading.loaded import LoadedModel
from kdcore.reporting.page import report
from kdcore.specs.distill import DistillSpec
from kdcore.specs.evaluate import EvaluateSpec
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import OTHER_TEXT, saved, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", CHATS)


def spec_of(folder: Path, teacher: Path, data: dict[str, Any], **changes: Any) -> DistillSpec:
    asked: dict[str, Any] = {
        "job": "distill",
        "run": folder / "run",
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": data,
        "method": {"gates": ["speckd"]},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
        "evaluation": {"samples": 2, "sample_tokens": 4},
    }
    return DistillSpec.model_validate(asked | changes)


@pytest.mark.parametrize("by", ["dataset", "teacher"])
def test_a_run_leaves_a_student_that_plain_transformers_loads(
    tmp_path: Path, teacher: Path, prompts: Path, by: str
) -> None:
    source = {"name": "chat", "path": prompts}
    data = {
        "train": source,
        "heldout": source | {"limit": 4},
        "responses": {"by": by, "max_new_tokens": 5},
    }
    training = {"batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, "epochs": 4}
    training |= {"batch_size": 2, "packing": True} if by == "dataset" else {}
    evaluation = {"samples": 2, "sample_tokens": 4, "answers": ["rouge_l"], "answer_tokens": 4}
    run = distill(spec_of(tmp_path, teacher, data, training=training, evaluation=evaluation))
    student = AutoModelForCausalLM.from_pretrained(run.path("model"))
    tokenizer = AutoTokenizer.from_pretrained(run.path("model"))
    assert student.config.num_hidden_layers == 2
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the mat?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    student.generate(**asked, max_new_tokens=3)
    results = run.read_json("results.json")
    assert results["after"]["teacher_kl"] < results["before"]["teacher_kl"]
    assert len(results["samples"]) == 2
    scores = run.read_json("heldout_rows.json")["after"]["scores"]["rouge_l"]
    assert len(scores) == 4 and results["after"]["rouge_l"] == sum(scores) / 4
    assert [metric["name"] for metric in results["metrics"]][-1] == "rouge_l"
    assert run.read_json("run.json")["status"] == "done"
    logged = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert {"loss", "term/kd", "acceptance/speckd", "learning_rate"} <= logged[0].keys()
    assert any("eval_teacher_kl" in line for line in logged)
    gated = json.loads(run.path("token_gates.json").read_text())
    assert [len(row["tokens"]) for row in gated] == run.read_json("heldout_rows.json")["after"][
        "lengths"
    ]
    tokens = [token for row in gated for token in row["tokens"]]
    floor = 0.01  # what the gate gives a refused token
    assert {(each["accepted"], round(each["weight"], 6)) for each in tokens} == {(0, floor), (1, 1)}
    page = report([run.folder])
    assert page.count('class="token refused"') > 0
    assert page.count("data-token=") == len(tokens)


def test_a_base_student_takes_the_teachers_template_and_end(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    base = tiny_model(seed=1, template=None)
    base.model.generation_config.eos_token_id = 0
    student = {"model": str(saved(base, tmp_path / "base"))}
    source = {"name": "chat", "path": prompts}
    run = distill(spec_of(tmp_path, teacher, {"train": source, "heldout": source}, student=student))
    ours = AutoTokenizer.from_pretrained(run.path("model"))
    assert ours.chat_template == AutoTokenizer.from_pretrained(teacher).chat_template
    ends = [
        AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        for folder in (run.path("model"), teacher)
    ]
    assert ends[0] == ends[1] != 0
    assert len(run.read_json("results.json")["samples"]) == 2


def test_adapters_are_saved_alone_and_merged(tmp_path: Path, teacher: Path, prompts: Path) -> None:
    data = {"train": {"name": "chat", "path": prompts}}
    student = {"model": str(teacher), "lora": {"r": 2}}
    run = distill(spec_of(tmp_path, teacher, data, student=student))
    merged = AutoModelForCausalLM.from_pretrained(run.path("model"))
    plain = AutoModelForCausalLM.from_pretrained(teacher)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert (run.path("adapter") / "adapter_model.safetensors").exists()
    assert any(
        not torch.equal(value, plain.state_dict()[name])
        for name, value in merged.state_dict().items()
    )


def test_the_figures_are_those_of_the_saved_model(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    """Adapters of the head, whose weights are the embeddings' too."""
    source = {"name": "chat", "path": prompts}
    student = {"model": str(teacher), "lora": {"r": 2, "targets": ["lm_head"]}}
    training = {"batch_size": 4, "learning_rate": 0.1, "steps": 6}
    spec = spec_of(
        tmp_path,
        teacher,
        {"train": source, "heldout": source},
        student=student,
        training=training,
        method={"terms": {"task": 1, "kd": 0}},
    )
    run = distill(spec)
    asked = {"model": {"model": str(run.path("model"))}, "heldout": source}
    plain = evaluate(EvaluateSpec.model_validate({"job": "evaluate"} | asked)).figures
    after = run.read_json("results.json")["after"]
    assert after["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)


def test_the_student_is_saved_before_it_is_judged(
    tmp_path: Path, teacher: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("this model cannot generate")

    monkeypatch.setattr("kdcore.jobs.distill.answers", fail)
    source = {"name": "chat", "path": prompts}
    evaluation = {"samples": 2, "before": False}
    data = {"train": source, "heldout": source}
    for name, student in {"all": {"layers": [0, 2]}, "lora": {"lora": {"r": 2}}}.items():
        asked = spec_of(tmp_path / name, teacher, data, evaluation=evaluation, student=student)
        with pytest.raises(RuntimeError, match="cannot generate"):
            distill(asked)
        student_of_it = AutoModelForCausalLM.from_pretrained(asked.run / "model")
        plain = AutoModelForCausalLM.from_pretrained(teacher)
        tensors = plain.state_dict()
        assert not torch.equal(
            student_of_it.state_dict()["model.layers.0.self_attn.q_proj.weight"],
            tensors["model.layers.0.self_attn.q_proj.weight"],
        )
        AutoTokenizer.from_pretrained(asked.run / "model")


def classifier_of(labels: list[str], folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
    )
    model = AutoModelForSequenceClassification.from_config(config)
    return saved(LoadedModel(model, tokenizer, "classifier", ""), folder)


def test_a_gate_is_given_the_reference_it_asks_for(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    folder = saved(tiny_model(seed=3, extra=2), tmp_path / "reference")
    source = {"name": "chat", "path": prompts}
    data = {"train": source, "heldout": source}
    gate = {"name": "adaspec", "reference": str(folder)}
    method = {"gates": [gate, {"name": "inverted", "gate": gate | {"fraction": 0.9}}]}
    asked = spec_of(tmp_path, teacher, data, method=method)
    assert preflight(asked).models["reference"].layers == 4
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = distill(asked)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run.read_json("run.json")["reference"]["name"] == str(folder)
    logged = json.loads(run.path("metrics.jsonl").read_text().splitlines()[0])
    assert 0.2 < logged["acceptance/adaspec"] < 0.6 and logged["acceptance/inverted"] < 0.3
    assert not any("adaspec" in name for name in run.read_json("results.json")["after"])


def test_a_reference_with_another_tokenizer_is_a_mistake_of_the_gates(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    stranger = saved(tiny_model(), tmp_path / "stranger")
    tiny_tokenizer(text=OTHER_TEXT).save_pretrained(stranger)
    method = {"gates": [{"name": "adaspec", "reference": str(stranger)}]}
    with pytest.raises(UserError, match=r"the tokenizers of .* differ in") as refused:
        data = {"train": {"name": "chat", "path": prompts}}
        distill(spec_of(tmp_path, teacher, data, method=method))
    assert refused.value.field == "method.gates"
    assert "reference model of the teacher's family" in refused.value.cure


def test_the_reference_decides_what_is_learned(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    data = {"train": {"name": "chat", "path": prompts}}
    weights = []
    for seed in (3, 4, 3):
        folder = saved(tiny_model(seed=seed), tmp_path / f"reference{seed}{len(weights)}")
        method = {"gates": [{"name": "adaspec", "reference": str(folder)}]}
        place = tmp_path / str(len(weights))
        run = distill(spec_of(place, teacher, data, method=method))
        weights.append(run.path("model", "model.safetensors").read_bytes())
    assert weights[0] == weights[2] != weights[1]


def test_a_reference_that_does_not_fit_is_refused(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    data = {"train": {"name": "chat", "path": prompts}}
    other = tiny_model()
    other.tokenizer.add_tokens(["<|another|>"])  # type: ignore[attr-defined]
    gates = [{"name": "adaspec", "reference": str(saved(other, tmp_path / "other"))}]
    with pytest.raises(UserError, match="differ in 1 tokens"):
        distill(spec_of(tmp_path, teacher, data, method={"gates": gates}))
    gates.append({"name": "adaspec", "reference": str(teacher)})
    with pytest.raises(UserError, match="different reference models"):
        distill(spec_of(tmp_path, teacher, data, method={"gates": gates}), overwrite=True)


def test_a_classifier_is_the_same_job(tmp_path: Path) -> None:
    rows = [f"the mat {n},{'sat' if n % 2 else 'stood'}" for n in range(12)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    source = {"name": "labelled_text", "path": tmp_path / "rows.csv"}
    data = {"train": source, "heldout": source}
    method = {
        "gates": ["speckd"],
        "splitters": [{"name": "deepkd", "unit": "share"}],
        "terms": {"task": 1.0},
    }
    teacher = classifier_of(["sat", "stood"], tmp_path / "teacher")
    run = distill(spec_of(tmp_path, teacher, data, method=method))
    student = AutoModelForSequenceClassification.from_pretrained(run.path("model"))
    assert student.config.id2label == {0: "sat", 1: "stood"}
    assert run.read_json("results.json")["after"]["accuracy"] >= 0.5
    other = classifier_of(["stood", "sat"], tmp_path / "other")
    with pytest.raises(UserError, match="has the labels"):
        distill(spec_of(tmp_path, other, data, run=tmp_path / "second"))


def test_held_out_rows_of_other_labels_are_refused(tmp_path: Path) -> None:
    """Their first label would be counted as the training rows' first."""
    (tmp_path / "rows.csv").write_text("text,label\nthe mat,lay\nthe mat,sat\nthe mat,stood\n")
    (tmp_path / "held.csv").write_text("text,label\nthe mat,sat\nthe mat,stood\n")
    sources = [
        {"name": "labelled_text", "path": tmp_path / name} for name in ("rows.csv", "held.csv")
    ]
    data = dict(zip(("train", "heldout"), sources, strict=True))
    teacher = classifier_of(["lay", "sat", "stood"], tmp_path / "teacher")
    asked = spec_of(tmp_path, teacher, data, training={"steps": 1})
    for carry_out in (preflight, distill):
        with pytest.raises(UserError, match=r"data\.heldout has sat, stood") as found:
            carry_out(asked)
        assert "classes_from" in found.value.cure
    data["heldout"]["classes_from"] = tmp_path / "rows.csv"
    assert distill(spec_of(tmp_path, teacher, data, run=tmp_path / "b")).finished


def test_the_last_step_is_logged_whatever_the_steps_between_logs(
    tmp_path: Path, teacher: Path, prompts: Path
) -> None:
    data = {
        "train": {"name": "chat", "path": prompts},
        "responses": {"by": "teacher", "max_new_tokens": 4},
    }
    asked = spec_of(tmp_path, teacher, data, training={"steps": 3, "log_every": 5})
    run = distill(asked)
    (line,) = map(json.loads, run.path("metrics.jsonl").read_text().splitlines())
    assert line["step"] == 3 and line["loss"] > 0
