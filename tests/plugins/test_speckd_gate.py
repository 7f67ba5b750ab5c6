"""The SpecKD gate against float64 formulas, its identities, and inside the loss engine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdcore.method.records import LOG_ZERO, LogitBatch
from tests.plugins.logit_batches import (
    build,
    logit_batch,
    random_batch,
    random_logits,
    train_step,
    weights_of,
)
from tests.reference import gates as reference
from tests.reference.divergences import forward_kl
from tests.reference.positions import per_position, sequence_mean

VERIFICATIONS = ("greedy", "sampling", "expected")
seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


def speckd(verification: str = "greedy", **params: Any) -> Any:
    return build("gate", "speckd", verification=verification, **params)


def accepted(batch: LogitBatch, verification: str, k: int) -> Tensor:
    return weights_of(speckd(verification, k=k, beta=0.0), batch)


@st.composite
def whole_logits(draw: Any) -> LogitBatch:
    """Small whole numbers, so that many logits are equal."""
    rows, positions, classes = draw(st.tuples(*[st.integers(1, 4)] * 2, st.integers(2, 9)))
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (rows, positions, classes)
    return logit_batch(*(torch.randint(-2, 3, shape, generator=generator).double() for _ in "st"))


@few
@given(whole_logits(), st.integers(1, 9), st.sampled_from([0.0, 0.01, 1.0]))
def test_greedy_is_the_formula_ties_included(batch: LogitBatch, k: int, beta: float) -> None:
    weights = weights_of(speckd(k=k, beta=beta), batch)
    decided = reference.speckd_greedy(batch.student.numpy(), batch.teacher.numpy(), k)
    assert (weights.numpy() == reference.floored(decided, beta)).all()


@few
@given(whole_logits(), st.floats(1e-3, 1e3))
def test_greedy_ignores_a_positive_scale_of_the_student(batch: LogitBatch, scale: float) -> None:
    scaled = dataclasses.replace(batch, student=batch.student * scale)
    assert torch.equal(accepted(batch, "greedy", 2), accepted(scaled, "greedy", 2))


@few
@given(seeds)
def test_greedy_with_k_1_is_agreement_and_with_k_v_everything(seed: int) -> None:
    batch = random_batch(seed)
    agree = batch.student.argmax(-1) == batch.teacher.argmax(-1)
    assert torch.equal(accepted(batch, "greedy", 1), agree.double())
    assert (accepted(batch, "greedy", 11) == 1).all()


@few
@given(seeds, st.integers(1, 11), st.integers(0, 6))
def test_greedy_needs_no_more_than_the_teachers_top_k(seed: int, k: int, more: int) -> None:
    batch = random_batch(seed)
    lowest = batch.teacher.topk(min(11, k + more)).values[..., -1:]
    cached = batch.teacher.masked_fill(batch.teacher < lowest, LOG_ZERO)
    cut = dataclasses.replace(batch, teacher=cached)
    assert torch.equal(accepted(batch, "greedy", k), accepted(cut, "greedy", k))


@few
@given(seeds, st.integers(1, 6), st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_expected_is_the_formula(seed: int, k: int, beta: float) -> None:
    batch = random_batch(seed)
    weights = weights_of(speckd("expected", k=k, beta=beta), batch)
    formula = reference.speckd_expected(batch.student.numpy(), batch.teacher.numpy(), k, beta)
    np.testing.assert_allclose(weights, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sampling_accepts_at_the_rate_of_the_closed_form(k: int) -> None:
    copies = 20_000
    one = random_batch(3, 1, 4, 11, dtype=torch.float32)
    student, teacher = (z.repeat(copies, 1, 1) for z in (one.student, one.teacher))
    rate = accepted(logit_batch(student, teacher), "sampling", k).double().mean(0)
    (expected,) = reference.speckd_acceptance(one.student.numpy(), one.teacher.numpy(), k)
    error = np.sqrt(expected * (1 - expected) / copies)
    assert (expected > 0.05).all() and (expected < 0.999).all(), "a trivial case proves nothing"
    assert (abs(rate.numpy() - expected) < 3 * error).all()


@few
@given(seeds, st.integers(1, 5), st.lists(st.integers(0, 10), max_size=4))
def test_sampling_draws_the_same_whatever_the_chunks(seed: int, k: int, cuts: list[int]) -> None:
    rows, positions, classes = 2, 5, 7
    batch = random_batch(seed, rows, positions, classes, dtype=torch.float32)
    gate = speckd("sampling", k=k)
    whole = weights_of(gate, batch).flatten()
    batch.generator.manual_seed(seed)
    edges = sorted({0, rows * positions, *cuts})
    chunks = [
        weights_of(
            gate,
            dataclasses.replace(
                batch,
                student=batch.student.reshape(1, -1, classes)[:, start:end],
                teacher=batch.teacher.reshape(1, -1, classes)[:, start:end],
                mask=batch.mask.reshape(1, -1)[:, start:end],
            ),
        )
        for start, end in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(chunks, 1)[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_are_accepted_whatever_is_drawn(dtype: torch.dtype) -> None:
    batch = random_batch(1, 50, 20, 101, dtype=dtype)
    same = dataclasses.replace(batch, teacher=batch.student.clone())
    for verification in VERIFICATIONS:
        assert (accepted(same, verification, 1) == 1).all()


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("student_first", [True, False])
def test_disjoint_supports_leave_the_floor_everywhere(
    verification: str, student_first: bool
) -> None:
    student, teacher = random_logits(1, 40, 25, 20).float(), random_logits(2, 40, 25, 20).float()
    student[..., 10:], teacher[..., :10] = LOG_ZERO, LOG_ZERO
    if not student_first:
        student, teacher = student.flip(-1), teacher.flip(-1)
    weights = weights_of(speckd(verification, beta=0.01), logit_batch(student, teacher))
    # total variation is a sum of rounded numbers; the other two decide, and decide exactly
    rounding = 1e-5 if verification == "expected" else 0.0
    torch.testing.assert_close(weights, torch.full_like(weights, 0.01), rtol=0, atol=rounding)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_no_impossible_token(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = random_logits(1, 1, 30, 20).float()
    student[..., :3] = student[..., -3:] = LOG_ZERO
    teacher = torch.full_like(student, LOG_ZERO)
    teacher[..., :3] = teacher[..., -3:] = 0.0
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform))
    assert (accepted(logit_batch(student, teacher), "sampling", 2) == 0).all()


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_beta_1_is_the_ungated_loss_bit_for_bit(verification: str) -> None:
    batch = random_batch(4, 3, 40, 50, dtype=torch.float32)
    plain, plain_gradient = train_step(batch)
    gated, gradient = train_step(batch, speckd(verification, beta=1.0))
    assert torch.equal(gated.losses["all"], plain.losses["all"])
    assert torch.equal(gradient, plain_gradient)


def ragged(seed: int) -> LogitBatch:
    """Rows of 1, 6 and 12 masked positions, and one of none."""
    batch = random_batch(seed, 4, 12, 11, dtype=torch.float32)
    return dataclasses.replace(batch, mask=torch.arange(12) < torch.tensor([[1], [6], [12], [0]]))


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.4])
def test_the_loss_is_linear_in_beta_and_a_mean_over_sequences(beta: float) -> None:
    batch = ragged(5)
    student, teacher, mask = (t.numpy() for t in (batch.student, batch.teacher, batch.mask))
    decided = reference.speckd_greedy(student, teacher, 3)
    divergence = per_position(forward_kl, student, teacher)
    everywhere = sequence_mean(divergence, np.ones(mask.shape), mask)
    where_accepted = sequence_mean(divergence, decided.astype(float), mask)
    assert 0 < where_accepted < everywhere
    step, _ = train_step(batch, speckd(k=3, beta=beta))
    expected = beta * everywhere + (1 - beta) * where_accepted
    assert step.losses["all"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.4])
def test_the_acceptance_rate_is_logged_whatever_the_floor(beta: float) -> None:
    batch = ragged(6)
    student, teacher, mask = (t.numpy() for t in (batch.student, batch.teacher, batch.mask))
    expected = reference.token_acceptance_rate(reference.speckd_greedy(student, teacher, 3), mask)
    step, _ = train_step(batch, speckd(k=3, beta=beta))
    assert 0 < expected < 1
    assert step.acceptance["gate0"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize(("chunk", "pad"), [(1, 0), (5, 0), (7, 3), (512, 3)])
def test_neither_padding_nor_chunks_change_the_step(
    verification: str, chunk: int, pad: int
) -> None:
    batch, gate = ragged(7), speckd(verification)
    step, gradient = train_step(batch, gate)
    other, other_gradient = train_step(batch, gate, chunk=chunk, pad=pad)
    torch.testing.assert_close(other.acceptance, step.acceptance)
    torch.testing.assert_close(other.losses, step.losses)
    torch.testing.assert_close(other_gradient, gradient)


def test_the_defaults_of_both_versions() -> None:
    second, first = build("gate", "speckd"), build("gate", "speckd_v1")
    assert (second.k, second.floor) == (5, 0.01)
    assert (first.k, first.floor) == (5, 0.0)
    batch = random_batch(8, 1, 200, 30)
    assert weights_of(second, batch).unique().tolist() == [0.01, 1.0]
    assert weights_of(first, batch).unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "params", [{"k": 0}, {"beta": -0.1}, {"beta": 1.1}, {"verification": "topk"}, {"rate": 1}]
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build("gate", "speckd", **params)


def test_a_vocabulary_of_49_thousand_classes_in_float32() -> None:
    classes = 49_152
    batch = random_batch(9, 1, 4, classes, scale=3.0, dtype=torch.float32)
    close = dataclasses.replace(batch, teacher=batch.student + batch.teacher / 6)
    student, teacher = close.student[0].double(), close.teacher[0].double()
    gap = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
    for k in (1, 5):
        expected = accepted(close, "expected", k)[0]
        torch.testing.assert_close(expected.double(), 1 - gap**k, rtol=0, atol=1e-5)
    copies = 500
    many = logit_batch(*(z.expand(-1, 4, -1)[:, :1] for z in (close.student, close.teacher)))
    gate = speckd("sampling", k=1, beta=0.0)
    rate = sum(weights_of(gate, many).item() for _ in range(copies)) / copies
    mean = 1 - gap[0].item()
    assert abs(rate - mean) < 3 * math.sqrt(mean * (1 - mean) / copies)
