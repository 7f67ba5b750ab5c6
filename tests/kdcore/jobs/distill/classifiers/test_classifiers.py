"""Classifiers as the case T = 1: new models, training without a teacher, images without tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.specs.distill import DistillSpec
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model

RESNET = {
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
}
ELECTRA = {
    "model_type": "electra",
    "embedding_size": 8,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LABELS_ALONE = {"terms": {"task": 1.0, "kd": 0.0}}


def digits(folder: Path, **changes: Any) -> DistillSpec:
    """A new ResNet on digits, without a teacher."""
    asked: dict[str, Any] = {
        "run": folder / "run",
        "student": {"model": "new", "config": RESNET},
        "data": {
            "train": {"name": "digits", "limit": 200},
            "heldout": {"name": "digits", "split": "validation", "limit": 100},
        },
        "method": LABELS_ALONE,
        "training": {"batch_size": 20, "learning_rate": 1e-2, "epochs": 3},
        "evaluation": {"batch_size": 50},
    }
    return DistillSpec.model_validate(asked | changes)


def weights(run: Any) -> dict[str, torch.Tensor]:
    return AutoModelForImageClassification.from_pretrained(run.path("model")).state_dict()


def test_a_teacher_is_trained_and_teaches(tmp_path: Path) -> None:
    first = distill(digits(tmp_path / "teacher"))
    after = first.read_json("results.json")["after"]
    assert after.keys() == {"accuracy", "top_5", "perplexity"} and after["accuracy"] > 0.3
    assert after["accuracy"] < after["top_5"] < 1
    metrics = {metric["name"] for metric in first.read_json("results.json")["metrics"]}
    assert metrics == {"accuracy", "top_5", "perplexity"}
    assert "No teacher" in first.path("README.md").read_text()
    assert "teacher" not in first.read_json("run.json")
    logged = [json.loads(line) for line in first.path("metrics.jsonl").read_text().splitlines()]
    assert "term/task" in logged[0] and "term/kd" not in logged[0]

    teacher = {"model": str(first.path("model"))}
    method = {
        "gates": ["speckd"],
        "splitters": ["deepkd"],
        "momentum": "deepkd",
        "terms": {"task": 0.5},
        "tau": 4.0,
    }
    training = {"batch_size": 20, "learning_rate": 1e-2, "optimizer": "sgd"}
    training |= {"momentum": 0.0, "clip": 0.0, "save_every": 5}
    training |= {"schedule": "multi_step", "milestones": [0.5], "warmup": 0}
    spec = digits(tmp_path / "student", teacher=teacher, method=method, training=training)
    run = distill(spec)
    results = run.read_json("results.json")
    assert results["after"]["teacher_kl"] < results["before"]["teacher_kl"]
    steps = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in steps if "loss" in line]
    assert rates == pytest.approx([1e-2] * 5 + [1e-3] * 5)
    config = AutoModelForImageClassification.from_pretrained(run.path("model")).config
    assert config.id2label == {i: str(i) for i in range(10)}
    found = preflight(spec.model_copy(update={"run": tmp_path / "other"}))
    assert found.example == () and found.classes == 10
    assert (found.models["student"].layers, found.models["student"].hidden) == (2, 8)
    assert found.models["student"].context is None
    assert found.memory["activations"] > 20 * 64 * 4 * 4, "more than the first feature map"
    assert found.seconds["training"] > 0


def test_the_seed_decides_a_new_model(tmp_path: Path) -> None:
    runs = [distill(digits(tmp_path / str(i), seed=seed)) for i, seed in enumerate((3, 3, 4))]
    one, same, other = map(weights, runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.1.weight"], other["classifier.1.weight"])


def test_a_text_classifier_is_new_too(tmp_path: Path) -> None:
    rows = [f"the mat {n},{'sat' if n % 2 else 'stood'}" for n in range(12)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    source = {"name": "labelled_text", "path": tmp_path / "rows.csv"}
    tokens = str(saved(tiny_model(), tmp_path / "tokens"))
    student = {"model": "new", "config": ELECTRA, "tokenizer": tokens}
    data = {"train": source, "heldout": source}
    spec = digits(tmp_path, student=student, data=data)
    assert preflight(spec).train.tokens > 1
    config = json.loads(distill(spec).path("model/config.json").read_text())
    assert config["vocab_size"] == 290 and config["pad_token_id"] == 0
    assert config["id2label"] == {"0": "sat", "1": "stood"}
    with pytest.raises(UserError, match="the spec names neither a tokenizer nor a teacher"):
        preflight(digits(tmp_path, student={"model": "new", "config": ELECTRA}, data=data))


def test_a_language_model_learns_the_labels_alone(tmp_path: Path) -> None:
    """Supervised fine-tuning: the same figures as a teacher of no weight would leave."""
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher sat {n}"} for n in range(8)]
    write_lines(tmp_path / "rows.jsonl", rows)
    source = {"name": "chat", "path": tmp_path / "rows.jsonl"}
    model = {"model": str(saved(tiny_model(), tmp_path / "model"))}
    shared: dict[str, Any] = {
        "student": model,
        "data": {"train": source, "heldout": source},
        "evaluation": {"samples": 1, "sample_tokens": 3},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
    }
    alone = distill(digits(tmp_path / "alone", **shared))
    taught = distill(digits(tmp_path / "taught", teacher=model, **shared))
    figures = alone.read_json("results.json")["after"]
    assert figures.keys() == {"accuracy", "perplexity"}
    assert figures.items() <= taught.read_json("results.json")["after"].items()
    assert alone.read_json("results.json")["samples"][0].keys() == {"prompt", "before", "after"}
    pair = [AutoModelForCausalLM.from_pretrained(r.path("model")) for r in (alone, taught)]
    one, other = (model.state_dict() for model in pair)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "who"),
    [
        ({}, "term 'kd'"),
        (LABELS_ALONE | {"gates": ["speckd"]}, "gate 'speckd'"),
        ({"splitters": ["target_split"], "terms": {"task": 1.0, "target": 0, "non_target": 0}},
         "a splitter"),
    ],
)  # fmt: skip
def test_a_method_that_needs_a_teacher_is_refused(
    tmp_path: Path, method: dict[str, Any], who: str
) -> None:
    for job in (preflight, distill):
        with pytest.raises(UserError, match=f"{who} requires a teacher") as caught:
            job(digits(tmp_path, method=method))
        assert "terms: {task: 1, kd: 0}" in caught.value.cure


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"layers": [0]}},
        {"data": {"train": {"name": "digits"}, "responses": {"by": "teacher"}}},
    ],
)
def test_what_a_teacher_would_have_to_give(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs a teacher"):
        digits(tmp_path, **changes)


@pytest.mark.parametrize(
    ("config", "cause", "cure"),
    [
        ({"model_type": "resnett"}, "'resnett' is unknown to transformers", "'resnet'"),
        (
            RESNET | {"depth": [1]},
            "sets 'depth', which is not a settable field of resnet",
            "'depths'",
        ),
        (RESNET | {"id2label": {}}, "sets 'id2label', which is not a settable field", "use one of"),
        (
            RESNET | {"layer_type": "odd"},
            "is invalid for resnet: .*layer_type",
            "correct that field",
        ),
        (RESNET | {"num_channels": 3}, "cannot read a row of the data", "num_channels"),
        (RESNET | {"depths": 3}, "is invalid for resnet: .*depths", "correct that field"),
    ],
)
def test_a_config_that_makes_no_model(
    tmp_path: Path, config: dict[str, Any], cause: str, cure: str
) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        preflight(digits(tmp_path, student={"model": "new", "config": config}))
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"model": "new"}, "a new student needs a config"),
        ({"model": "new", "config": {"depths": [1]}}, "a new student needs a config"),
        ({"model": "some/model", "config": RESNET}, "apply only to a new model"),
        ({"model": "some/model", "tokenizer": "other/model"}, "apply only to a new model"),
    ],
)
def test_a_model_is_new_or_is_not(tmp_path: Path, student: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        digits(tmp_path, student=student)


def test_a_model_whose_config_does_not_say_its_width_is_estimated(tmp_path: Path) -> None:
    """As those of timm."""
    config = {"model_type": "mobilenet_v2", "num_channels": 1, "depth_multiplier": 0.1}
    report = preflight(digits(tmp_path, student={"model": "new", "config": config}))
    assert report.seconds["training"] > 0
