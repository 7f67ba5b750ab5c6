"""Classifiers that give a row any number of labels: a sigmoid for each label, compared by KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from kdcore.components.construction import ChoiceBuilder
from kdcore.data.rows import batch_of, collate, padding
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.method.loss_engine import LossEngine
from kdcore.models.loading.load import load_model
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.training.method import objective_of
from kdcore.training.model_view import ModelView
from kdcore_baselines.method import divergences
from kdcore_baselines.sources.components import LabelledTextParams
from kdcore_baselines.sources.labelled import LabelledTextSource
from tests.tiny.tiny_chat_models import saved, tiny_model

LABELS = ["calm", "loud", "wet"]
ELECTRA: dict[str, Any] = {
    "model_type": "electra",
    "hidden_size": 16,
    "embedding_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Any]:
    said = ["calm", "loud;wet", "", "calm;loud;wet", "wet", "loud"] * 2
    lines = [f"the mat {n},{labels}" for n, labels in enumerate(said)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return {"name": "labelled_text", "path": str(tmp_path / "rows.csv"), "separator": ";"}


def spec_of(folder: Path, rows: dict[str, Any], **changes: Any) -> DistillSpec:
    tokens = folder / "tokens"
    if not tokens.exists():
        saved(tiny_model(), tokens)
    asked: dict[str, Any] = {
        "run": folder / "run",
        "student": {"model": "new", "config": ELECTRA, "tokenizer": str(tokens)},
        "data": {"train": rows, "heldout": rows},
        "method": {"terms": {"task": 1, "kd": 0}},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "epochs": 2},
    }
    return DistillSpec.model_validate(asked | changes)


@pytest.fixture
def teacher(tmp_path: Path, rows: dict[str, Any]) -> Path:
    return distill(spec_of(tmp_path, rows)).path("model")


def source_of(rows: dict[str, Any]) -> LabelledTextSource:
    fields = {name: value for name, value in rows.items() if name != "name"}
    return LabelledTextSource(LabelledTextParams(**fields), ChoiceBuilder())


def sigmoid_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(teacher)) || Bernoulli(sigmoid(student))) of each label."""
    p, q = teacher.sigmoid(), student.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_the_loss_is_that_of_a_sigmoid_for_each_label(
    tmp_path: Path, rows: dict[str, Any], teacher: Path
) -> None:
    """Against float64, and against the loss that transformers computes from the labels."""
    source = source_of(rows)
    assert source.classes == LABELS
    kind = AutoModelForSequenceClassification
    loaded = load_model(ModelSpec(model=str(teacher)), kind=kind)
    torch.manual_seed(1)
    student: Any = kind.from_config(loaded.model.config).eval()
    with torch.no_grad():
        for model in (student, loaded.model):  # so that the two differ
            model.classifier.out_proj.weight.mul_(30)
    encoded = [source.encode(each, loaded.tokenizer, 32) for each in source.read()[:4]]
    assert [row.labels.tolist() for row in encoded[:3]] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    batch = batch_of(collate(list(enumerate(encoded)), padding(loaded.tokenizer)))
    tau = 2.0
    objective = objective_of({}, [], divergences.forward_kl(), {"task": 0.5, "kd": 1.0}, tau=tau)
    engine = LossEngine(objective, {"all": ("task", "kd")}, chunk=5)
    step = engine(
        ModelView(student, 2)(student, batch),
        ModelView(loaded.model, 2)(loaded.model, batch),
        batch,
        whole=4.0,
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    student.zero_grad()
    step.losses["all"].backward()
    found = student.classifier.out_proj.weight.grad.clone()

    own = student(**batch.inputs, labels=batch.labels.float())
    theirs = loaded.model(**batch.inputs).logits.double()
    ours = own.logits.double()
    kl = tau**2 * sigmoid_kl(ours / tau, theirs / tau).mean()
    task = F.binary_cross_entropy_with_logits(ours, batch.labels.double())
    assert kl > 0.01
    assert float(step.terms["kd"]) == pytest.approx(kl.item(), rel=1e-5)
    assert float(step.terms["task"]) == pytest.approx(task.item(), rel=1e-5)
    assert float(step.terms["task"]) == pytest.approx(own.loss.item(), rel=1e-5)
    student.zero_grad()
    (0.5 * own.loss + kl).backward()
    torch.testing.assert_close(found, student.classifier.out_proj.weight.grad)


def test_a_run_from_the_labels_and_from_a_teacher(
    tmp_path: Path, rows: dict[str, Any], teacher: Path
) -> None:
    config = json.loads((teacher / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == LABELS
    spec = spec_of(
        tmp_path,
        rows,
        run=tmp_path / "student",
        teacher={"model": str(teacher)},
        student={"model": "new", "config": ELECTRA},
        method={"gates": [{"name": "speckd", "k": 1}], "splitters": ["none"], "divergence": "jsd"},
    )
    run = distill(spec)
    results = run.read_json("results.json")
    assert "top_5" not in results["after"] and "gate/speckd" in results["after"]
    assert results["after"]["teacher_kl"] < results["before"]["teacher_kl"]
    kind = AutoModelForSequenceClassification
    pair = [load_model(ModelSpec(model=str(f)), kind=kind) for f in (run.path("model"), teacher)]
    source = source_of(rows)
    encoded = [source.encode(each, pair[1].tokenizer, 1024) for each in source.read()]
    batch = batch_of(collate(list(enumerate(encoded)), padding(pair[1].tokenizer)))
    ours, theirs = (each.model(**batch.inputs).logits.double() for each in pair)
    expected = {
        "teacher_kl": sigmoid_kl(ours, theirs),
        "accuracy": (ours > 0) == (batch.labels > 0),
        "agreement": (ours > 0) == (theirs > 0),
    }
    for name, values in expected.items():
        assert results["after"][name] == pytest.approx(float(values.double().mean()), abs=1e-6)
    said, true = (ours > 0).numpy(), batch.labels.numpy()
    each = f1_score(true, said, average=None, zero_division=0)
    assert results["after"]["f1"] == pytest.approx(f1_score(true, said, average="micro"))
    assert [results["after"][f"f1/{label}"] for label in LABELS] == pytest.approx(list(each))
    assert "F1 of the labels" in {metric["title"] for metric in results["metrics"]}


@pytest.mark.parametrize("splitter", ["dkd", "deepkd", "top_k_mask", "standardise"])
def test_splitters_of_classes_are_refused(
    tmp_path: Path, rows: dict[str, Any], teacher: Path, splitter: str
) -> None:
    given: Any = {"name": splitter, "part": "kd"} if splitter == "top_k_mask" else splitter
    spec = spec_of(
        tmp_path,
        rows,
        run=tmp_path / "other",
        teacher={"model": str(teacher)},
        student={"model": "new", "config": ELECTRA},
        method={"splitters": [given]},
    )
    with pytest.raises(UserError, match="parts or masks the classes of a position"):
        distill(spec)


def test_models_and_data_of_the_other_kind_are_refused(
    tmp_path: Path, rows: dict[str, Any], teacher: Path
) -> None:
    single = {"name": "labelled_text", "path": str(tmp_path / "single.csv")}
    (tmp_path / "single.csv").write_text("text,label\na,calm\nb,loud\nc,wet\n")
    new = {"model": "new", "config": ELECTRA}
    spec = spec_of(
        tmp_path, single, run=tmp_path / "a", teacher={"model": str(teacher)}, student=new
    )
    with pytest.raises(UserError, match="gives a row any number of labels, but a row of the data"):
        distill(spec)
    one = distill(spec_of(tmp_path, single, run=tmp_path / "one")).path("model")
    spec = spec_of(tmp_path, rows, run=tmp_path / "b", teacher={"model": str(one)}, student=new)
    with pytest.raises(UserError, match="gives a row one label, but a row of the data"):
        distill(spec)
    alike = {"teacher": {"model": str(teacher)}, "student": {"model": str(one)}}
    with pytest.raises(UserError, match="one gives a row any number of labels"):
        distill(spec_of(tmp_path, rows, run=tmp_path / "c", **alike))
