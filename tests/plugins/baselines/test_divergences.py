"""The divergences against float64 formulas and finite differences; excluded classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdcore.method.protocols import Divergence, Stateful
from kdcore.method.records import LOG_ZERO
from kdcore_baselines.method.divergences import mass_on_head
from tests.plugins.logit_batches import build, logit_batch, random_logits, train_step
from tests.reference import divergences as reference
from tests.reference.finite_differences import gradient
from tests.reference.positions import per_position

seeds = st.integers(0, 10_000)

CHOICES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "akl": {"mass": 0.5},
    "taid": {"start": 0.4},
}
every = pytest.mark.parametrize("name", CHOICES)


def divergence(name: str) -> Any:
    return build("divergence", name, **CHOICES[name])


def formula(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """The same in float64, from logits [V] of student and teacher."""
    rest = {"t": 0.4} if name == "taid" else CHOICES[name]
    return lambda student, teacher: getattr(reference, name)(student, teacher, **rest)


def of_logits(measure: Any, student: Tensor, teacher: Tensor) -> Tensor:
    return measure(student.log_softmax(-1), teacher.log_softmax(-1))


def slopes(measure: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient at the student's logits of the sum over positions."""
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(of_logits(measure, student, teacher).sum(), student)
    return found


def expected_slopes(name: str, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """By central differences of the formula [V]; what is a constant to the gradient stays put."""
    if name == "akl":
        forward, reverse = reference.akl_weights(student, teacher)
        return gradient(
            lambda z: (
                forward * reference.forward_kl(z, teacher)
                + reverse * reference.reverse_kl(z, teacher)
            ),
            student,
        )
    if name == "taid":
        target = reference.taid_target(student, teacher, 0.4)
        return gradient(lambda z: reference.forward_kl(z, target), student)
    return gradient(lambda z: formula(name)(z, teacher), student)


def pair(seed: int, *shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return random_logits(2 * seed, *shape, scale=scale), random_logits(
        2 * seed + 1, *shape, scale=scale
    )


@every
@settings(max_examples=20, deadline=None)
@given(seed=seeds, classes=st.integers(2, 40), scale=st.sampled_from([0.1, 2.0, 20.0]))
def test_value_is_the_formula(name: str, seed: int, classes: int, scale: float) -> None:
    student, teacher = pair(seed, 2, 3, classes, scale=scale)
    values = of_logits(divergence(name), student, teacher)
    expected = per_position(formula(name), student.numpy(), teacher.numpy())
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
    single = of_logits(divergence(name), student.float(), teacher.float())
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=2e-6)


@every
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_gradient_is_that_of_the_formula(name: str, seed: int) -> None:
    student, teacher = pair(seed, 1, 2, 7)
    expected = [
        expected_slopes(name, s, t)
        for s, t in zip(student[0].numpy(), teacher[0].numpy(), strict=True)
    ]
    found = slopes(divergence(name), student, teacher)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@every
@pytest.mark.parametrize("zero", [LOG_ZERO, 2 * LOG_ZERO, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_both_exclude_counts_for_nothing(
    name: str, zero: float, dtype: torch.dtype
) -> None:
    student, teacher = (z.to(dtype) for z in pair(1, 3, 4, 8))
    excluded = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    wide = [z.masked_fill(excluded, zero) for z in (student, teacher)]
    narrow = [z[..., ~excluded].contiguous() for z in (student, teacher)]
    torch.testing.assert_close(
        of_logits(divergence(name), *wide), of_logits(divergence(name), *narrow)
    )
    found = slopes(divergence(name), *wide)
    assert (found[..., excluded] == 0).all()
    torch.testing.assert_close(found[..., ~excluded], slopes(divergence(name), *narrow))

    # and at the log-probs themselves, before a softmax's backward could hide anything
    logp = wide[0].log_softmax(-1).requires_grad_()
    value = divergence(name)(logp, wide[1].log_softmax(-1))
    (at_logp,) = torch.autograd.grad(value.sum(), logp)
    assert (at_logp[..., excluded] == 0).all()


@every
@pytest.mark.parametrize("one_sided", ["student", "teacher", "both"])
def test_supports_that_differ_give_finite_numbers(name: str, one_sided: str) -> None:
    student, teacher = (z.float() for z in pair(2, 2, 3, 6))
    if one_sided in ("student", "both"):
        student[..., :3] = LOG_ZERO
    if one_sided in ("teacher", "both"):
        teacher[..., 3:] = LOG_ZERO
    values, found = (f(divergence(name), student, teacher) for f in (of_logits, slopes))
    assert values.isfinite().all() and (values > 0).all()
    assert found.isfinite().all()
    if name == "total_variation" and one_sided == "both":
        torch.testing.assert_close(values, torch.ones_like(values))


@every
def test_equal_distributions_pull_nowhere(name: str) -> None:
    student = random_logits(1, 2, 3, 9).float()
    found = slopes(divergence(name), student, student.clone())
    torch.testing.assert_close(found, torch.zeros(2, 3, 9), rtol=0, atol=1e-6)


@every
def test_the_engine_hands_the_same_gradient_on(name: str) -> None:
    student, teacher = (z.float() for z in pair(3, 3, 5, 9))
    _, found = train_step(logit_batch(student, teacher), divergence=divergence(name), chunk=4)
    expected = slopes(divergence(name), student, teacher) / 15
    torch.testing.assert_close(found, expected)


def test_two_backward_passes_through_one_forward_give_the_same() -> None:
    student, teacher = pair(4, 2, 3, 9)
    student.requires_grad_()
    loss = of_logits(divergence("forward_kl"), student, teacher).sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in "12")
    assert torch.equal(first, second)


def test_the_ends_of_jsd_are_the_two_kls_by_convention() -> None:
    student, teacher = pair(5, 2, 3, 9)
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        end = build("divergence", "jsd", beta=beta)
        assert torch.equal(
            of_logits(end, student, teacher), of_logits(divergence(name), student, teacher)
        )
    half = build("divergence", "jsd")
    assert (of_logits(half, student, teacher) <= math.log(2)).all()
    torch.testing.assert_close(of_logits(half, student, teacher), of_logits(half, teacher, student))


POWERS = [(0.2, 0.7), (0.1, 0.1), (0.5, 0.5), (1, 1), (2, 0.3), (0, 0.4), (0, 1), (0.4, 0), (1, 0)]


@pytest.mark.parametrize(("alpha", "beta"), POWERS)
@settings(max_examples=5, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.01, 2.0, 20.0]))
def test_alpha_beta_is_the_formula_at_all_powers(
    alpha: float, beta: float, seed: int, scale: float
) -> None:
    student, teacher = pair(seed, 1, 3, 9, scale=scale)
    measure = build("divergence", "alpha_beta", alpha=alpha, beta=beta)

    def plain(s: np.ndarray, t: np.ndarray) -> float:
        return reference.alpha_beta(s, t, alpha=alpha, beta=beta)

    expected = per_position(plain, student.numpy(), teacher.numpy())
    values = of_logits(measure, student, teacher)
    np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-12)
    single = of_logits(measure, student.float(), teacher.float())
    np.testing.assert_allclose(single, expected, rtol=2e-4, atol=2e-6)
    found = slopes(measure, student, teacher)[0, 0]
    difference = gradient(lambda z: plain(z, teacher[0, 0].numpy()), student[0, 0].numpy())
    np.testing.assert_allclose(found, difference, rtol=1e-5, atol=1e-7)


def test_the_ends_of_alpha_beta_are_the_two_kls_and_its_limits_are_continuous() -> None:
    student, teacher = pair(6, 2, 3, 9)
    ends = {"forward_kl": {"alpha": 1, "beta": 0}, "reverse_kl": {"alpha": 0, "beta": 1}}
    for name, powers in ends.items():
        found = of_logits(build("divergence", "alpha_beta", **powers), student, teacher)
        torch.testing.assert_close(found, of_logits(divergence(name), student, teacher))
    s, t = student[0, 0].numpy(), teacher[0, 0].numpy()
    for near, limit in (((1e-6, 0.6), (0, 0.6)), ((0.6, 1e-6), (0.6, 0))):
        at_limit = reference.alpha_beta(s, t, alpha=limit[0], beta=limit[1])
        assert reference.alpha_beta(s, t, alpha=near[0], beta=near[1]) == pytest.approx(
            at_limit, rel=1e-4
        )


@given(seed=seeds, scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]), mass=st.floats(0.0, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_head_is_found_however_long_it_is(seed: int, scale: float, mass: float) -> None:
    # at a mass of 1 the last class is in or out by the rounding of a sum
    teacher = random_logits(seed, 1, 3, 700, scale=scale)
    teacher = teacher + torch.linspace(0, 1e-3, 700)  # no two classes are equal
    values = random_logits(seed + 1, 1, 3, 700).abs()
    found = mass_on_head(values, teacher.softmax(-1), mass)[0]
    for t, position in enumerate(teacher[0].numpy()):
        head = reference.akl_head(position, mass=mass)
        assert found[t].item() == pytest.approx(values[0, t][torch.from_numpy(head)].sum().item())


@settings(deadline=None)
@given(
    losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=20),
    start=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 5e-4, 0.3]),
    interrupted=st.integers(0, 20),
)
def test_taid_moves_its_target_as_the_formula_says(
    losses: list[float], start: float, alpha: float, interrupted: int
) -> None:
    params = {"start": start, "end": 0.9, "alpha": alpha, "decay": 0.8}
    measure, t, momentum, previous = build("divergence", "taid", **params), start, 0.0, None
    assert isinstance(measure, Divergence) and isinstance(measure, Stateful)
    for step, loss in enumerate(losses):
        if step == interrupted:
            state = measure.state_dict()
            measure = build("divergence", "taid", **params)
            measure.load_state_dict(state)
        progress = (step + 1) / len(losses)
        measure.step_done({"loss": 9 * loss, "distilled": loss, "progress": progress})
        t, momentum = reference.taid_next(t, momentum, previous, loss, progress, **params)
        previous = loss
        assert measure.t == pytest.approx(t, rel=1e-12)
        student, teacher = pair(step, 1, 1, 5)
        expected = reference.taid(student[0, 0].numpy(), teacher[0, 0].numpy(), t=t)
        found = of_logits(measure, student, teacher).item()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", [0.0, 1e-300, 1e6])
def test_no_loss_stops_taid(loss: float) -> None:
    measure = build("divergence", "taid")
    for each in (1.0, loss, 1.0, 0.5):
        measure.step_done({"distilled": each, "progress": 0.5})
    assert math.isfinite(measure.momentum) and measure.t >= 0.7


def test_akl_of_the_whole_mass_is_the_forward_kl() -> None:
    """The sum of the probabilities may exceed 1 by rounding."""
    student, teacher = pair(0, 4, 8, 700)
    found = of_logits(build("divergence", "akl", mass=1.0), student.float(), teacher.float())
    plain = of_logits(build("divergence", "forward_kl"), student.float(), teacher.float())
    assert torch.equal(found, plain)


def test_taid_leaves_the_student_although_it_begins_there() -> None:
    """With ``start: 0`` the target is the student itself, and J is 0 up to rounding."""
    student, teacher = pair(0, 2, 3, 7)
    measure = build("divergence", "taid", start=0.0, alpha=0.5)
    for step in range(6):
        loss = of_logits(measure, student, teacher).mean().item()
        measure.step_done({"distilled": loss if step else 0.0, "progress": step / 6})
    assert measure.t == pytest.approx(5 / 6)
    assert -0.06 < measure.momentum < 0, "a loss that rises from 0 counts as one that doubles"


def test_a_detached_mixture_has_no_slope() -> None:
    """DistiLLM-2: the value is that of skew_reverse_kl, the mixture a constant to its gradient."""
    student, teacher = random_logits(3, 2, 4, 9), random_logits(4, 2, 4, 9)
    plain = build("divergence", "skew_reverse_kl", alpha=0.3)
    detached = build("divergence", "skew_reverse_kl", alpha=0.3, detached=True)
    value = of_logits(detached, student, teacher)
    torch.testing.assert_close(value, of_logits(plain, student, teacher))
    found = slopes(detached, student, teacher)
    for place in np.ndindex(*value.shape):
        z, p = student[place].double().numpy(), teacher[place].double().numpy()
        mixed = np.log(0.3 * np.exp(z) / np.exp(z).sum() + 0.7 * np.exp(p) / np.exp(p).sum())
        expected = gradient(lambda each, m=mixed: reference.reverse_kl(each, m), z)
        np.testing.assert_allclose(found[place].numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("jsd", {"beta": 1.1}),
        ("skew_kl", {"alpha": 0.0}),
        ("skew_reverse_kl", {"alpha": 1.0}),
        ("akl", {"mass": -0.1}),
        ("alpha_beta", {"alpha": 0.05}),
        ("alpha_beta", {"alpha": 0, "beta": 0}),
        ("taid", {"decay": 1.0}),
        ("forward_kl", {"beta": 0.5}),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build("divergence", name, **params)
