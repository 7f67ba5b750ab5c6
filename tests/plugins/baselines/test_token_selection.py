"""AdaKD and SE-KD against float64 formulas, their schedules, limits and neutral elements."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from kdcore import DistillationLoss
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.method.protocols import RankedGate, Stateful
from kdcore.method.records import LogitBatch
from kdcore.training.trainer.checkpointing import STATE_FILE
from kdcore_baselines.method.token_selection.adakd import AdaKD
from tests.plugins.logit_batches import build, random_batch, train_step, weights_of
from tests.reference import token_selection as reference
from tests.reference.divergences import forward_kl
from tests.tiny.distill_specs import distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
fractions = st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0])


def ragged(seed: int) -> LogitBatch:
    """Rows of 3, 7 and 12 masked positions."""
    batch = random_batch(seed, 3, 12, 11)
    return dataclasses.replace(batch, mask=torch.arange(12) < torch.tensor([[3], [7], [12]]))


@few
@given(seeds, fractions, st.floats(-1, 1))
def test_adakd_is_the_formula(seed: int, fraction: float, strength: float) -> None:
    batch = ragged(seed)
    student, teacher = (each[batch.mask].numpy() for each in (batch.student, batch.teacher))
    gate = build("gate", "adakd", start=fraction, strength=strength)
    scores = gate.score(batch)[batch.mask]
    weights = gate.weigh(scores, 0.5)
    selected = reference.adakd_selected(student, teacher, fraction)
    assert set(weights.nonzero()[:, 0].tolist()) == set(selected)
    expected = reference.adakd_temperatures(student, teacher, fraction, strength)
    found = gate.temperatures(scores, weights)
    for place, tau in expected.items():
        assert found[place].item() == pytest.approx(tau, rel=1e-12)
    step, _ = train_step(batch, gate, normalize="accepted", chunk=4)
    rows = torch.arange(3).repeat_interleave(torch.tensor([3, 7, 12])).numpy()
    means = [
        np.mean([each for i, each in loss_at(student, teacher, expected).items() if rows[i] == row])
        for row in sorted({int(rows[i]) for i in expected})
    ]
    assert step.losses["all"].item() == pytest.approx(sum(means) / 3, rel=1e-5)


def loss_at(student: Any, teacher: Any, temperatures: dict[int, float]) -> dict[int, float]:
    """The loss of each position: the formula's, for a selection of this one alone."""
    return {
        i: tau**2 * forward_kl(student[i] / tau, teacher[i] / tau)
        for i, tau in temperatures.items()
    }


@few
@given(seeds, fractions)
def test_adakd_of_one_row_is_the_mean_of_the_released_code(seed: int, fraction: float) -> None:
    batch = random_batch(seed, 1, 13, 11)
    gate = build("gate", "adakd", start=fraction)
    step, _ = train_step(batch, gate, normalize="accepted")
    expected = reference.adakd_loss(
        batch.student[0].numpy(), batch.teacher[0].numpy(), fraction, strength=0.5
    )
    assert step.losses["all"].item() == pytest.approx(expected, rel=1e-5)


def test_adakd_without_focus_and_temperature_is_no_gate() -> None:
    batch = random_batch(3, 3, 12, 11, dtype=torch.float32)
    neutral = build("gate", "adakd", step=0, strength=0)
    for progress in (0.01, 0.5, 1.0):
        neutral.step_done({"distilled": 1 - progress, "progress": progress})
    step, gradient = train_step(batch, neutral)
    plain, plain_gradient = train_step(batch)
    assert torch.equal(step.losses["all"], plain.losses["all"])
    assert torch.equal(gradient, plain_gradient)
    assert step.acceptance["gate0"] == 1


def test_adakds_temperatures_fall_from_easy_to_hard_tokens() -> None:
    gate = build("gate", "adakd", strength=0.7)
    scores = torch.tensor([1e-9, 0.2, 0.4, 0.6, 1.0])
    found = gate.temperatures(scores, torch.ones(5))
    assert (found.diff() < 0).all()
    assert found[2] == 1, "the median keeps the temperature of the loss"
    torch.testing.assert_close(found[0], torch.tensor(math.exp(0.7)))
    turned = build("gate", "adakd", strength=-0.7).temperatures(scores, torch.ones(5))
    torch.testing.assert_close(found * turned, torch.ones(5))
    alike = gate.temperatures(torch.zeros(3), torch.ones(3))
    assert (alike == 1).all(), "a student that equals its teacher has no hard token"


@few
@given(
    st.lists(st.floats(0.01, 4), min_size=1, max_size=60),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.9]),
)
def test_adakds_fraction_follows_the_loss(losses: list[float], warmup: int, decay: float) -> None:
    gate = build("gate", "adakd", decay=decay, warmup=warmup / 100, step=0.2, tolerance=0.1)
    found = []
    for number, loss in enumerate(losses, start=1):
        gate.step_done({"loss": 9 * loss, "distilled": loss, "progress": number / 100})
        found.append(gate.fraction)
    expected = reference.adakd_fractions(losses, warmup, decay, tolerance=0.1, step=0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert min(found) >= 0.1


def test_adakd_resumes_with_its_fraction() -> None:
    gate = AdaKD(warmup=0.0, decay=0.0)
    for loss in (4.0, 3.0, 2.0, 1.0):
        gate.step_done({"distilled": loss, "progress": 0.5})
    resumed = AdaKD(warmup=0.0, decay=0.0)
    resumed.load_state_dict(gate.state_dict())
    assert resumed.fraction == gate.fraction == pytest.approx(0.95**3)
    assert isinstance(gate, Stateful) and isinstance(gate, RankedGate)


@few
@given(seeds, fractions, st.floats(0, 1))
def test_se_kd_is_the_formula_in_each_row(seed: int, fraction: float, window: float) -> None:
    batch = ragged(seed)
    gate = build("gate", "se_kd", fraction=fraction, window=window)
    weights = weights_of(gate, batch)
    for row in range(3):
        kept = batch.mask[row]
        selected = reference.se_kd_selected(batch.student[row][kept].numpy(), fraction, window)
        assert set(weights[row].nonzero()[:, 0].tolist()) == selected


def test_the_engine_ranks_each_row_for_se_kd() -> None:
    """Twenty per cent of each row, rounded up, while a ranking of all positions keeps 4 of 22."""
    batch = ragged(5)
    together, _ = train_step(batch, build("gate", "student_entropy"), chunk=4)
    apart, gradient = train_step(batch, build("gate", "se_kd"), chunk=4)
    shares = [math.ceil(0.2 * count) / count for count in (3, 7, 12)]
    torch.testing.assert_close(apart.acceptance["gate0"].item(), sum(shares) / 3)
    assert together.acceptance["gate0"] != apart.acceptance["gate0"]
    reached = gradient.ne(0).any(-1).sum(-1)
    assert reached.tolist() == [math.ceil(0.2 * count) for count in (3, 7, 12)]


def test_se_kds_curriculum_goes_from_the_surest_positions_to_the_unsurest() -> None:
    gate = build("gate", "se_kd", fraction=0.25, window=[[0, 0], [0.4, 1]])
    scores = torch.arange(8.0)
    for progress, kept in ((0.0, [0, 1]), (0.2, [3, 4]), (0.4, [6, 7]), (1.0, [6, 7])):
        assert gate.weigh(scores, progress).nonzero()[:, 0].tolist() == kept
    grows = build("gate", "se_kd", fraction=[[0, 0.25], [1, 1]])
    assert [int(grows.weigh(scores, p).sum()) for p in (0.0, 0.5, 1.0)] == [2, 5, 8]


def test_inverted_se_kd_keeps_the_other_positions_of_each_row() -> None:
    batch = ragged(5)
    kept = weights_of(build("gate", "se_kd"), batch)
    turned = weights_of(build("gate", "inverted", gate="se_kd"), batch)
    assert torch.equal((kept + turned)[batch.mask], torch.ones(22, dtype=kept.dtype))


def test_inverted_adakd_softens_the_hard_tokens_that_it_keeps_less() -> None:
    batch = random_batch(4, 2, 8, 11)
    gate = build("gate", "inverted", gate={"name": "adakd", "start": 0.5})
    scores = gate.score(batch).flatten()
    factors = gate.temperatures(scores, gate.weigh(scores, 0.5))
    assert (factors[scores.argsort()].diff() <= 0).all()


@few
@given(seeds, fractions, st.integers(1, 60))
def test_the_threshold_of_a_queue_is_the_formula(seed: int, fraction: float, queue: int) -> None:
    gate = build("gate", "se_kd_queue", fraction=fraction, queue=queue)
    batches = [random_batch(seed + n, 1, 5 + 3 * n, 11) for n in range(6)]
    steps = [batch.student[0].numpy() for batch in batches]
    expected = reference.se_kd_queue_selected(steps, fraction, queue)
    for batch, selected in zip(batches, expected, strict=True):
        scores = gate.score(batch)[0]
        kept = set(gate.weigh(scores, 0.5).nonzero()[:, 0].tolist())
        assert kept == selected or selected is None
        gate.remember(scores)
    assert len(gate.queue) == min(queue, sum(map(len, steps)))


def test_the_first_step_of_a_queue_ranks_each_row() -> None:
    batch = ragged(5)
    first, _ = train_step(batch, build("gate", "se_kd_queue"), chunk=4)
    ranked, _ = train_step(batch, build("gate", "se_kd"), chunk=4)
    assert first.acceptance == ranked.acceptance


def test_a_queue_has_the_scores_of_whole_steps_alone() -> None:
    """In a loop of one's own too: of all micro-batches, after the step, and of no measurement."""
    gate = build("gate", "se_kd_queue", queue=100)
    loss_of = DistillationLoss(gates=[gate], steps=4)
    logits = [random_batch(n, 2, 6, 11, dtype=torch.float32) for n in range(2)]
    for each in logits:
        loss_of(each.student.requires_grad_(), each.teacher, each.labels, shifted=True)
        assert len(gate.queue) == 0
    loss_of.step()
    entropies = torch.cat([gate.score(each).detach().flatten() for each in logits])
    torch.testing.assert_close(gate.queue, entropies)
    turned = build("gate", "inverted", gate={"name": "se_kd_queue", "queue": 3})
    turned.remember(entropies)
    assert torch.equal(turned.state_dict()["queue"], entropies[-3:])
    with pytest.raises(UserError, match="learns from each step"):
        DistillationLoss(gates=["se_kd_queue"])
    DistillationLoss(gates=["se_kd"])


def test_a_resumed_run_has_the_queue(tmp_path: Path) -> None:
    saved(tiny_model(seed=1), tmp_path / "student")
    saved(tiny_model(seed=2), tmp_path / "teacher")
    spec = distill_spec(
        tmp_path,
        tmp_path / "student",
        teacher={"model": str(tmp_path / "teacher")},
        method={"gates": [{"name": "se_kd_queue", "queue": 30, "fraction": 0.5}]},
        training={"save_every": 2, "learning_rate": 1e-2, "probe_every": 2, "steps": 4},
    )
    run = distill(spec)
    losses, rates = logged(run), logged(run, "acceptance/se_kd_queue")
    queue = load_file(run.path("checkpoint-2", STATE_FILE))["gate.se_kd_queue/queue"]
    assert len(queue) == 30 and len(set(rates)) > 1
    for left in ("checkpoint-4", "model"):
        shutil.rmtree(spec.run / left)
    (spec.run / "README.md").unlink()
    assert logged(distill(spec, resume=True)) == losses


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("se_kd_queue", {"queue": 0}),
        ("se_kd_queue", {"queue": 2**25}),
        ("adakd", {"start": 0}),
        ("adakd", {"step": 1}),
        ("adakd", {"strength": 3}),
        ("se_kd", {"fraction": 0}),
        ("se_kd", {"fraction": [[0, 0.2], [1, 1.2]]}),
        ("se_kd", {"window": [[0, -0.1], [1, 1]]}),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build("gate", name, **params)
