"""The gates to compare with, against float64 formulas, inverted, and inside the loss engine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdcore.method.protocols import Gate, RankedGate, Stateful
from kdcore.method.records import LOG_ZERO, LogitBatch
from kdcore_baselines.method.gates import TopFraction, inverted
from tests.plugins.logit_batches import (
    build,
    logit_batch,
    random_batch,
    random_logits,
    train_step,
    weights_of,
)
from tests.reference import gates as reference

seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)

# What a spec could choose: one of each gate, and each kind inverted.
CHOICES: list[dict[str, Any]] = [
    {"name": "all"},
    {"name": "uniform", "weight": 0.3},
    {"name": "random", "rate": 0.4, "floor": 0.1},
    {"name": "entropy"},
    {"name": "entropy", "threshold": 1.5},
    {"name": "confidence", "threshold": 0.5},
    {"name": "student_entropy"},
    {"name": "hellinger"},
    {"name": "inverted", "gate": "confidence"},
    {"name": "inverted", "gate": {"name": "speckd", "verification": "sampling"}},
    {"name": "inverted", "gate": "student_entropy"},
    {"name": "inverted", "gate": {"name": "inverted", "gate": "hellinger"}},
]
IDS = [str(choice) for choice in CHOICES]


def chosen(choice: dict[str, Any]) -> Any:
    return build("gate", **choice)


ADASPEC = {"name": "adaspec", "reference": "a model"}


def beside_a_reference(batch: LogitBatch, seed: int) -> LogitBatch:
    drawn = random_batch(seed + 10**6, *batch.student.shape)
    return dataclasses.replace(batch, reference=drawn.student)


def masked_batch(seed: int) -> LogitBatch:
    """Rows of 1, 6 and 12 masked positions, and one of none."""
    batch = random_batch(seed, 4, 12, 11, dtype=torch.float32)
    return dataclasses.replace(batch, mask=torch.arange(12) < torch.tensor([[1], [6], [12], [0]]))


@few
@given(seeds)
def test_entropy_soft_is_the_formula(seed: int) -> None:
    batch = random_batch(seed)
    formula = reference.entropy_soft(batch.teacher.numpy())
    weights = weights_of(build("gate", "entropy"), batch)
    np.testing.assert_allclose(weights, formula, rtol=0, atol=1e-12)


@few
@given(seeds, st.floats(0.1, 2.4))
def test_entropy_hard_is_the_formula(seed: int, threshold: float) -> None:
    batch = random_batch(seed)
    weights = weights_of(build("gate", "entropy", threshold=threshold), batch)
    assert (weights.numpy() == reference.entropy_hard(batch.teacher.numpy(), threshold)).all()


@few
@given(seeds, st.floats(0.1, 0.95))
def test_confidence_is_the_formula(seed: int, threshold: float) -> None:
    batch = random_batch(seed)
    weights = weights_of(build("gate", "confidence", threshold=threshold), batch)
    assert (weights.numpy() == reference.confidence(batch.teacher.numpy(), threshold)).all()


@few
@given(seeds, st.floats(0.01, 1.0))
def test_student_entropy_is_the_formula(seed: int, fraction: float) -> None:
    batch = dataclasses.replace(random_batch(seed), mask=random_logits(seed, 2, 5) < 1.0)
    assume(batch.mask.any())
    weights = weights_of(build("gate", "student_entropy", fraction=fraction), batch)
    formula = reference.student_entropy(batch.student.numpy(), batch.mask.numpy(), fraction)
    assert (weights.numpy() == formula).all()


@few
@given(seeds, st.floats(0.01, 1.0))
def test_hellinger_is_the_formula(seed: int, fraction: float) -> None:
    batch = random_batch(seed)
    student, teacher, mask = (t.numpy() for t in (batch.student, batch.teacher, batch.mask))
    gate = build("gate", "hellinger", fraction=fraction)
    distances = [
        reference.hellinger_distance(s, t)
        for s, t in zip(student.reshape(-1, 11), teacher.reshape(-1, 11), strict=True)
    ]
    np.testing.assert_allclose(gate.score(batch).flatten(), distances, rtol=1e-12)
    formula = reference.hellinger(student, teacher, mask, fraction)
    assert (weights_of(gate, batch).numpy() == formula).all()


@few
@given(seeds, st.floats(0.01, 1.0))
def test_adaspec_is_the_formula(seed: int, fraction: float) -> None:
    batch = beside_a_reference(random_batch(seed), seed)
    three = [t.numpy() for t in (batch.student, batch.teacher, batch.reference) if t is not None]
    gate = build("gate", "adaspec", reference="a model", fraction=fraction)
    assert gate.reference == build("gate", "inverted", gate=ADASPEC).reference == "a model"
    scores = [
        reference.adaspec_score(*position)
        for position in zip(*(logits.reshape(-1, 11) for logits in three), strict=True)
    ]
    np.testing.assert_allclose(gate.score(batch).flatten(), scores, rtol=1e-9, atol=1e-12)
    formula = reference.adaspec(*three, batch.mask.numpy(), fraction)
    assert (weights_of(gate, batch).numpy() == formula).all()


def test_adaspec_keeps_two_fifths_by_default() -> None:
    batch = beside_a_reference(random_batch(1, 10, 20), 1)
    assert weights_of(chosen(ADASPEC), batch).mean().item() == 0.4


@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
def test_adaspec_in_two_passes_by_chunks_is_one_pass_over_the_whole(normalize: str) -> None:
    batch = beside_a_reference(random_batch(3, 3, 9), 3)
    gate = chosen(ADASPEC)
    whole, gradient = train_step(batch, gate, normalize=normalize)
    assert gradient.any(-1).equal(weights_of(gate, batch) == 1)
    for chunk in (1, 4, 7):
        step, other = train_step(batch, gate, chunk=chunk, pad=2, normalize=normalize)
        torch.testing.assert_close(step.losses, whole.losses)
        torch.testing.assert_close(step.acceptance, whole.acceptance)
        torch.testing.assert_close(other, gradient)


def test_one_fifth_of_the_positions_by_default_and_seven_tenths_of_confidence() -> None:
    batch = random_batch(1, 10, 20)
    assert weights_of(build("gate", "student_entropy"), batch).mean().item() == 0.2
    largest = batch.teacher.softmax(-1).amax(-1)
    weights = weights_of(build("gate", "confidence"), batch)
    assert torch.equal(weights, (largest > 0.7).double())


@few
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_a_top_fraction_keeps_all_that_equal_the_last_kept(
    scores: list[int], fraction: float
) -> None:
    given_scores = torch.tensor(scores, dtype=torch.float32)
    weights = TopFraction(lambda batch: batch.student, fraction).weigh(given_scores, 0.5)
    everywhere = np.ones(len(scores), dtype=bool)
    assert (weights.numpy() == reference.top_fraction(np.array(scores), fraction, everywhere)).all()
    order = torch.arange(len(scores)).flip(0)
    shuffled = TopFraction(lambda batch: batch.student, fraction).weigh(given_scores[order], 0.5)
    assert torch.equal(shuffled, weights[order])


def test_a_top_fraction_of_no_position_is_no_position() -> None:
    assert build("gate", "student_entropy").weigh(torch.empty(0), 0.5).shape == (0,)


def test_random_keeps_at_its_rate_and_leaves_the_floor_elsewhere() -> None:
    batch, rate = random_batch(1, 100, 200, 2), 0.37
    weights = weights_of(build("gate", "random", rate=rate, floor=0.01), batch)
    assert weights.unique().tolist() == [0.01, 1.0]
    error = math.sqrt(rate * (1 - rate) / weights.numel())
    assert abs((weights == 1).double().mean().item() - rate) < 3 * error
    again = weights_of(build("gate", "random", rate=rate, floor=0.01), batch)
    assert not torch.equal(weights, again), "the next draw must be another one"
    assert (weights_of(build("gate", "random", rate=1.0), batch) == 1).all()
    assert (weights_of(build("gate", "random", rate=0.0), batch) == 0).all()


@few
@given(seeds, st.lists(st.integers(1, 9), max_size=3))
def test_random_draws_the_same_whatever_the_chunks(seed: int, cuts: list[int]) -> None:
    batch, gate = random_batch(seed, 1, 10, 3), build("gate", "random", rate=0.5)
    whole = weights_of(gate, batch)
    batch.generator.manual_seed(seed)
    edges = sorted({0, 10, *cuts})
    chunks = [
        weights_of(gate, dataclasses.replace(batch, mask=batch.mask[:, start:end]))
        for start, end in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(chunks, 1), whole)


def test_all_and_uniform() -> None:
    batch = random_batch(1)
    assert (weights_of(build("gate", "all"), batch) == 1).all()
    assert (weights_of(build("gate", "uniform", weight=0.3), batch) == 0.3).all()
    step, gradient = train_step(masked_batch(1), build("gate", "all"))
    plain, plain_gradient = train_step(masked_batch(1))
    assert torch.equal(step.losses["all"], plain.losses["all"])
    assert torch.equal(gradient, plain_gradient)


@few
@given(seeds, st.sampled_from(["confidence", "speckd", "student_entropy", "hellinger"]))
def test_inverted_keeps_what_the_gate_refuses(seed: int, name: str) -> None:
    batch = random_batch(seed)
    gate, turned = build("gate", name), build("gate", "inverted", gate=name)
    assert isinstance(turned, RankedGate) == isinstance(gate, RankedGate)
    floor = getattr(gate, "floor", 0.0)
    assert turned.floor == floor
    kept, refused = weights_of(gate, batch), weights_of(turned, batch)
    torch.testing.assert_close(refused, torch.where(kept == 1, floor, 1.0).double())
    assert (refused >= 0).all() and (refused <= 1).all()
    back = build("gate", "inverted", gate={"name": "inverted", "gate": name})
    torch.testing.assert_close(weights_of(back, batch), kept)


def test_the_acceptance_of_an_inverted_gate_is_the_rest() -> None:
    batch = masked_batch(3)
    for name in ("speckd", "student_entropy"):
        step, _ = train_step(batch, build("gate", name))
        turned, _ = train_step(batch, build("gate", "inverted", gate=name))
        total = step.acceptance["gate0"] + turned.acceptance["gate0"]
        torch.testing.assert_close(total, torch.tensor(1.0))


class Alternating:
    """A gate with a memory: keeps everything on even steps, nothing on odd ones."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, batch: LogitBatch) -> Tensor:
        return torch.full(batch.mask.shape, float(self.step % 2 == 0))

    def step_done(self, metrics: Mapping[str, float]) -> None:
        self.step += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])


class ContextOf:
    """Builds one thing, whatever is asked for."""

    def __init__(self, built: Any) -> None:
        self.build = lambda choice: built


def test_inverted_passes_the_gates_memory_on() -> None:
    class Params:
        gate = None

    turned: Any = inverted(Params(), ContextOf(Alternating()))  # type: ignore[arg-type]
    assert isinstance(turned, Stateful) and isinstance(turned, Gate)
    batch = random_batch(1)
    assert (weights_of(turned, batch) == 0).all()
    turned.step_done({})
    assert (weights_of(turned, batch) == 1).all()
    assert turned.state_dict() == {"step": torch.tensor(1)}
    fresh: Any = inverted(Params(), ContextOf(Alternating()))  # type: ignore[arg-type]
    fresh.load_state_dict(turned.state_dict())
    assert (weights_of(fresh, batch) == 1).all()
    forgetful = build("gate", "inverted", gate="confidence")
    assert not isinstance(forgetful, Stateful)


@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_weights_lie_in_the_unit_interval_even_at_the_extremes(choice: dict[str, Any]) -> None:
    student, teacher = random_logits(1, 3, 6, 9, scale=40), random_logits(2, 3, 6, 9, scale=40)
    student[0], teacher[0] = 0.0, 0.0  # no knowledge at all
    student[1, :, 5:], teacher[1, :, 5:] = LOG_ZERO, LOG_ZERO
    for dtype in (torch.float32, torch.float64):
        weights = weights_of(chosen(choice), logit_batch(student.to(dtype), teacher.to(dtype)))
        assert weights.shape == (3, 6)
        assert (weights >= 0).all() and (weights <= 1).all()


@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
@pytest.mark.parametrize(("chunk", "pad"), [(1, 0), (5, 0), (7, 3), (512, 3)])
def test_neither_padding_nor_chunks_change_the_step(
    choice: dict[str, Any], chunk: int, pad: int
) -> None:
    batch = masked_batch(7)
    for normalize in ("sequence", "accepted"):
        step, gradient = train_step(batch, chosen(choice), normalize=normalize)
        other, other_gradient = train_step(
            batch, chosen(choice), chunk=chunk, pad=pad, normalize=normalize
        )
        torch.testing.assert_close(other.acceptance, step.acceptance)
        torch.testing.assert_close(other.losses, step.losses)
        torch.testing.assert_close(other_gradient, gradient)


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "random"},
        {"name": "random", "rate": 1.5},
        {"name": "uniform", "weight": -0.1},
        {"name": "entropy", "threshold": 0},
        {"name": "student_entropy", "fraction": 0},
        {"name": "hellinger", "fraction": 1.1},
        {"name": "adaspec"},
        ADASPEC | {"fraction": 0},
        {"name": "inverted"},
        {"name": "inverted", "gate": "no_such_gate"},
        {"name": "all", "rate": 1},
    ],
)
def test_parameters_out_of_range_are_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chosen(choice)
