"""The reference split, its cotangents and the top-k mask against identities."""

import math

import numpy as np
import pytest

from tests.reference.deepkd import decoupled, top_k_mask
from tests.reference.finite_differences import gradient
from tests.reference.positions import per_position

CLASSES, LABEL = 7, 2
TAUS = [0.5, 1.0, 4.0]


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher logits [V]."""
    random = np.random.default_rng(1)
    return 2 * random.normal(size=CLASSES), 2 * random.normal(size=CLASSES)


def kept_of(teacher: np.ndarray, k: int | None) -> np.ndarray | None:
    return None if k is None else top_k_mask.top_k_mask(teacher, LABEL, k)


def test_tau_is_one_unless_given(pair):
    """Every formula's default."""
    for formula in [
        decoupled.tckd,
        decoupled.nckd,
        decoupled.tckd_naive,
        decoupled.nckd_naive,
        decoupled.tckd_cotangent,
        decoupled.nckd_cotangent,
        decoupled.dkd,
    ]:
        given = formula(*pair, LABEL, tau=1.0)
        assert np.array_equal(formula(*pair, LABEL), given)
        assert not np.allclose(given, formula(*pair, LABEL, tau=2.0))
    for whole in [decoupled.kd, decoupled.kd_cotangent]:
        assert np.array_equal(whole(*pair), whole(*pair, tau=1.0))
    for one in [
        decoupled.log_odds,
        decoupled.label_prob,
        decoupled.rest_prob,
        decoupled.nckd_weight,
    ]:
        assert one(pair[1], LABEL) == one(pair[1], LABEL, 1.0)
    kept = top_k_mask.top_k_mask(pair[1], LABEL, 3)
    assert decoupled.dropped_mass(pair[1], LABEL, kept) == decoupled.dropped_mass(
        pair[1], LABEL, kept, 1.0
    )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("label", range(CLASSES))
def test_parts_add_up_in_value_and_gradient(tau, label, pair):
    student, teacher = pair
    weight = decoupled.nckd_weight(teacher, label, tau)
    parts = decoupled.tckd(student, teacher, label, tau) + weight * decoupled.nckd(
        student, teacher, label, tau
    )
    assert parts == pytest.approx(decoupled.kd(student, teacher, tau), rel=1e-13)
    cotangent = decoupled.tckd_cotangent(
        student, teacher, label, tau
    ) + weight * decoupled.nckd_cotangent(student, teacher, label, tau)
    assert cotangent == pytest.approx(decoupled.kd_cotangent(student, teacher, tau), abs=1e-14)


def test_task_cotangent_by_finite_differences(pair):
    slope = gradient(lambda z: decoupled.task_ce(z, LABEL), pair[0])
    assert decoupled.task_cotangent(pair[0], LABEL) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("tau", TAUS)
def test_target_cotangent_by_finite_differences(tau, pair):
    student, teacher = pair
    slope = gradient(lambda z: decoupled.tckd(z, teacher, LABEL, tau), student)
    assert decoupled.tckd_cotangent(student, teacher, LABEL, tau) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [None, 1, 3, CLASSES - 1])
def test_non_target_cotangent_by_finite_differences(tau, k, pair):
    student, teacher = pair
    kept = kept_of(teacher, k)
    slope = gradient(lambda z: decoupled.nckd(z, teacher, LABEL, tau, kept), student)
    cotangent = decoupled.nckd_cotangent(student, teacher, LABEL, tau, kept)
    assert cotangent == pytest.approx(slope, abs=1e-8)
    assert cotangent[LABEL] == 0
    if kept is not None:
        assert (cotangent[~kept] == 0).all()
    assert cotangent.sum() == pytest.approx(0, abs=1e-14)


def test_target_cotangent_opposes_the_task_only_where_the_student_is_surer(pair):
    student, teacher = pair
    for label in range(CLASSES):
        soft, ref = decoupled.label_prob(student, label), decoupled.label_prob(teacher, label)
        expected = -(soft - ref) / (1 - soft) * decoupled.task_cotangent(student, label)
        cotangent = decoupled.tckd_cotangent(student, teacher, label)
        assert cotangent == pytest.approx(expected)
        assert (cotangent @ decoupled.task_cotangent(student, label) < 0) == (soft > ref)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_both_forms_agree_where_the_naive_one_holds(tau, k, pair):
    student, teacher = pair
    kept = kept_of(teacher, k)
    assert decoupled.tckd(student, teacher, LABEL, tau) == pytest.approx(
        decoupled.tckd_naive(student, teacher, LABEL, tau), rel=1e-10
    )
    assert decoupled.nckd(student, teacher, LABEL, tau, kept) == pytest.approx(
        decoupled.nckd_naive(student, teacher, LABEL, tau, kept), rel=1e-10, abs=1e-14
    )


@pytest.mark.parametrize("ref", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("soft", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("classes", [2, 4])
def test_no_nan_at_the_extremes(ref, soft, classes):
    student, teacher = np.linspace(0, 1, classes), np.linspace(0.5, 0, classes)
    student[0], teacher[0] = soft, ref
    for kept in [None, top_k_mask.top_k_mask(teacher, 0, 1)]:
        values = [
            decoupled.tckd(student, teacher, 0),
            decoupled.nckd(student, teacher, 0, 1.0, kept),
            *decoupled.task_cotangent(student, 0),
            *decoupled.tckd_cotangent(student, teacher, 0),
            *decoupled.nckd_cotangent(student, teacher, 0, 1.0, kept),
        ]
        assert np.isfinite(values).all()
    assert decoupled.tckd(student, teacher, 0) >= 0


def test_naive_forms_fail_where_the_log_odds_do_not():
    student, teacher = np.array([1e3, 0.0, 1.0]), np.array([0.0, 1.0, 0.5])
    assert not math.isfinite(decoupled.tckd_naive(student, teacher, 0))
    assert not math.isfinite(decoupled.nckd_naive(student, teacher, 0))
    ref = decoupled.label_prob(teacher, 0)
    expected = (1 - ref) * 1e3
    assert decoupled.tckd(student, teacher, 0) == pytest.approx(expected, rel=1e-2)


def test_the_label_is_never_in_the_non_target_part(pair):
    student, teacher = pair
    moved = student.copy()
    moved[LABEL] += 5
    assert decoupled.nckd(moved, teacher, LABEL) == decoupled.nckd(student, teacher, LABEL)
    everything = np.ones(CLASSES, dtype=bool)
    for kept in [everything, ~everything]:
        with pytest.raises(ValueError, match="never the label"):
            decoupled.nckd(student, teacher, LABEL, 1.0, kept)


def test_one_kept_class_says_nothing(pair):
    student, teacher = pair
    kept = top_k_mask.top_k_mask(teacher, LABEL, 1)
    assert decoupled.nckd(student, teacher, LABEL, 4.0, kept) == 0
    assert (decoupled.nckd_cotangent(student, teacher, LABEL, 4.0, kept) == 0).all()


def test_formulas_hold_at_each_position_of_a_batch(pair):
    student, teacher = (np.stack([z, -z])[None] for z in pair)
    labels = np.array([[LABEL, 0]])
    values = per_position(decoupled.tckd, student, teacher, labels)
    assert values[0, 1] == decoupled.tckd(-pair[0], -pair[1], 0)
    cotangents = per_position(decoupled.nckd_cotangent, student, teacher, labels)
    assert cotangents.shape == (1, 2, CLASSES)


def test_dkd_frees_the_weights(pair):
    student, teacher = pair
    weight = decoupled.nckd_weight(teacher, LABEL, 4.0)
    assert decoupled.dkd(student, teacher, LABEL, 4.0, 1.0, weight) == pytest.approx(
        decoupled.kd(student, teacher, 4.0)
    )
    whole = decoupled.dkd(student, teacher, LABEL, 4.0)
    target, rest = (part(student, teacher, LABEL, 4.0) for part in (decoupled.tckd, decoupled.nckd))
    assert whole == pytest.approx(target + 8 * rest)
    assert decoupled.dkd(student, teacher, LABEL, 4.0, warm_up=0.25) == pytest.approx(whole / 4)
    assert [decoupled.dkd_warm_up(epoch) for epoch in [0, 5, 20, 200]] == [0, 0.25, 1, 1]


def test_released_weighting_differs_unless_every_sample_is_weighed_alike(pair):
    student, teacher = np.stack([pair[0], pair[1]]), np.stack([pair[1], 4 * pair[0]])
    labels = np.array([LABEL, LABEL])

    def exact(teachers: np.ndarray) -> float:
        rows = zip(student, teachers, labels, strict=True)
        return float(
            np.mean(
                [
                    decoupled.nckd_weight(t, y, 4.0) * decoupled.nckd(s, t, y, 4.0)
                    for s, t, y in rows
                ]
            )
        )

    assert decoupled.released_kd(student, teacher, labels, 4.0)[1] != pytest.approx(
        exact(teacher), rel=1e-3
    )
    alike = np.stack([pair[1], pair[1]])
    assert decoupled.released_kd(student, alike, labels, 4.0)[1] == pytest.approx(exact(alike))


# the dynamic top-k mask


def test_top_k_mask_keeps_exactly_k_non_label_classes(pair):
    _, teacher = pair
    for label in range(CLASSES):
        for k in range(1, CLASSES + 3):
            kept = top_k_mask.top_k_mask(teacher, label, k)
            assert kept.sum() == min(k, CLASSES - 1)
            assert not kept[label]
            left = ~kept & decoupled.others(CLASSES, label)
            assert not left.any() or teacher[kept].min() > teacher[left].max()
    assert list(top_k_mask.top_k_mask(np.zeros(4), 1, 2)) == [True, False, True, False]
    with pytest.raises(ValueError, match="empty"):
        top_k_mask.top_k_mask(teacher, LABEL, 0)


def test_all_classes_kept_is_no_mask(pair):
    student, teacher = pair
    kept = top_k_mask.top_k_mask(teacher, LABEL, CLASSES - 1)
    assert (kept == decoupled.others(CLASSES, LABEL)).all()
    assert decoupled.nckd(student, teacher, LABEL, 4.0, kept) == decoupled.nckd(
        student, teacher, LABEL, 4.0
    )
    assert decoupled.dropped_mass(teacher, LABEL, kept, 4.0) == 0


def test_dropped_mass_completes_the_distribution(pair):
    _, teacher = pair
    kept = top_k_mask.top_k_mask(teacher, LABEL, 3)
    seen = decoupled.softmax(teacher, 4.0)[kept].sum() + decoupled.label_prob(teacher, LABEL, 4.0)
    assert decoupled.dropped_mass(teacher, LABEL, kept, 4.0) == pytest.approx(1 - seen)


def test_released_mask_loses_a_class_to_the_label(pair):
    _, teacher = pair
    order = np.argsort(-teacher)
    assert top_k_mask.released_top_k_mask(teacher, order[1], 3).sum() == 2
    assert top_k_mask.released_top_k_mask(teacher, order[5], 3).sum() == 3


def test_linear_schedule():
    ks = [top_k_mask.linear_k(p, 100, 20) for p in [0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1]]
    assert ks == [5, 12, 20, 20, 20, 60, 99]
    ks = [top_k_mask.linear_k(p, 100, 20) for p in np.linspace(0, 1, 101)]
    assert ks == sorted(ks)
    assert top_k_mask.linear_k(0, 2, 1) == 1
    assert top_k_mask.linear_k(0, 10, 2) == 1
    assert top_k_mask.linear_k(0.4, 100, 20, borders=(0.4, 0.5)) == 20


def test_log_schedule():
    classes = 65536
    ks = [top_k_mask.log_k(p, classes) for p in [0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1]]
    assert ks == [16, 64, 256, 256, 256, 4096, classes - 1]
    assert top_k_mask.log_k(0, 8) == 7
