"""Held-out figures against the plain formulas, and the same in whatever batches and chunks."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdcore.errors import UserError
from kdcore.evaluation.heldout import measure
from kdcore.method.objective import Objective
from kdcore.method.records import Batch
from kdcore.runs.results import Measured
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.views import StudentView
from tests.kdcore.method.test_loss_engine import HalfConfident, Noise, lm_batch, objective
from tests.reference.softmax import log_softmax
from tests.tiny.models import language_model


def split(batch: Batch, size: int) -> list[Batch]:
    return [
        Batch(
            {name: value[start : start + size] for name, value in batch.inputs.items()},
            batch.labels[start : start + size],
            batch.mask[start : start + size],
            batch.index[start : start + size],
        )
        for start in range(0, len(batch.labels), size)
    ]


def measured(batches: list[Batch], made: Objective, chunk: int) -> Measured:
    student, teacher = language_model(seed=1), language_model(seed=2)
    view = StudentView(student, 61, LiveTeacher.of(teacher, 61))
    return measure(view, student, batches, made.gates, chunk, seed=0)


def test_figures_are_the_formulas_over_all_positions() -> None:
    batch, gate = lm_batch(), HalfConfident()
    found = measured([batch], objective((gate,)), chunk=4)
    student, teacher = language_model(seed=1), language_model(seed=2)
    with torch.no_grad():
        z_student = student(**batch.inputs).logits[batch.mask].double().numpy()
        z_teacher = teacher(**batch.inputs).logits[batch.mask].double().numpy()
    labels = batch.labels[batch.mask].numpy()
    kl, nll, tv, same, right, weight = [], [], [], [], [], []
    for z_s, z_t, label in zip(z_student, z_teacher, labels, strict=True):
        logp, logq = log_softmax(z_s), log_softmax(z_t)
        kl.append(float((np.exp(logq) * (logq - logp)).sum()))
        nll.append(-float(logp[label]))
        tv.append(float(np.abs(np.exp(logq) - np.exp(logp)).sum()) / 2)
        same.append(z_s.argmax() == z_t.argmax())
        right.append(z_s.argmax() == label)
        weight.append(1.0 if z_s.max() > z_t.max() else gate.floor)
    expected = {
        "teacher_kl": np.mean(kl),
        "perplexity": np.exp(np.mean(nll)),
        "acceptance": 1 - np.mean(tv),
        "agreement": np.mean(same),
        "accuracy": np.mean(right),
        "gate/gate0": np.mean(weight),
    }
    assert found.means() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_top_5_of_a_classifier_is_the_share_of_labels_among_its_five_likeliest_classes() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 9)), random.integers(9, size=40)
    logits[0, :7] = 2.0  # seven classes share the first place, and the label's is one of them
    labels[0] = 6
    model = Fixed(torch.tensor(logits))
    batch = Batch(
        {"rows": torch.arange(40)},
        torch.tensor(labels)[:, None],
        torch.ones(40, 1, dtype=torch.bool),
        torch.arange(40),
    )
    places = [(row > row[label]).sum() for row, label in zip(logits, labels, strict=True)]
    found = measure(StudentView(model, 9), model, [batch], {}, chunk=7, seed=0).means()
    assert found["top_5"] == pytest.approx(np.mean(np.array(places) < 5))
    fewer = replace(batch, labels=batch.labels % 5)
    few = measure(StudentView(model, 5), model, [fewer], {}, chunk=7, seed=0)
    assert few.sums.keys() == {"cross_entropy", "accuracy"}


class Fixed(torch.nn.Module):
    """A classifier with the logits that it is given."""

    device = torch.device("cpu")
    config = SimpleNamespace(problem_type=None)

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def can_generate(self) -> bool:
        return False

    def forward(self, rows: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[rows])


def test_gates_that_draw_draw_alike_in_any_chunks() -> None:
    whole = measured([lm_batch()], objective((Noise(), Noise())), chunk=512).sums
    pieces = measured([lm_batch()], objective((Noise(), Noise())), chunk=5).sums
    for name in ("gate/gate0", "gate/gate1"):
        assert pieces[name] == whole[name]
    assert whole["gate/gate0"] != whole["gate/gate1"]


@pytest.mark.parametrize(("size", "chunk"), [(1, 512), (2, 3), (3, 1)])
def test_batches_and_chunks_change_nothing(size: int, chunk: int) -> None:
    whole = measured([lm_batch()], objective(), chunk=512)
    pieces = measured(split(lm_batch(), size), objective(), chunk)
    assert pieces.lengths == whole.lengths == [3, 4, 5]
    for name, values in whole.sums.items():
        assert pieces.sums[name] == pytest.approx(values, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_not_finite_is_refused(value: float) -> None:
    models = {"the measured model": language_model(seed=1), "the teacher": language_model(seed=2)}
    for name, faulty in models.items():
        broken = {**models, name: copy.deepcopy(faulty)}
        broken[name].lm_head.weight.data[7] = value
        student, teacher = broken.values()
        view = StudentView(student, 61, LiveTeacher.of(teacher, 61))
        with pytest.raises(UserError, match=f"logits of {name} contain NaN or infinite"):
            measure(view, student, [lm_batch()], {}, 4, seed=0)
