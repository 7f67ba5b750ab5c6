"""The reference formulas of losses, gates and reductions against each other and identities."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.reference import divergences, gates, positions
from tests.reference.finite_differences import gradient
from tests.reference.positions import per_position
from tests.reference.softmax import entropy, log_softmax, softmax

CLASSES = 6
TAUS = [0.5, 1.0, 4.0]
ALL_DIVERGENCES = [
    divergences.forward_kl,
    divergences.reverse_kl,
    divergences.jsd,
    divergences.skew_kl,
    divergences.skew_reverse_kl,
    divergences.total_variation,
    divergences.alpha_beta,
    divergences.akl,
    divergences.taid,
]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def pair(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher logits [V]."""
    return 2 * random.normal(size=CLASSES), 2 * random.normal(size=CLASSES)


@pytest.fixture
def batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student and teacher logits [B, T, V] and a ragged mask [B, T] with one empty row."""
    student, teacher = random.normal(size=(2, 4, 5, CLASSES))
    mask = np.arange(5) < np.array([5, 2, 0, 3])[:, None]
    return student, teacher, mask


def logits_of(*probs: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probs))


# softmax


def test_log_softmax_agrees_with_torch(pair):
    for tau in TAUS:
        expected = torch.log_softmax(torch.tensor(pair[0]) / tau, dim=-1).numpy()
        assert log_softmax(pair[0], tau) == pytest.approx(expected, abs=1e-14)


def test_softmax_survives_large_logits_and_excluded_classes():
    assert softmax(np.array([1e5, 0.0])) == pytest.approx([1.0, 0.0])
    assert log_softmax(np.array([1e5, 0.0]))[1] == -1e5
    assert list(softmax(np.array([0.0, -np.inf, 0.0]))) == [0.5, 0.0, 0.5]
    assert entropy(np.zeros(CLASSES)) == pytest.approx(math.log(CLASSES))
    assert entropy(np.array([1e5, 0.0])) == 0


def test_gradient_of_a_known_function(random):
    at = random.normal(size=(2, 3))
    assert gradient(lambda x: float((x**3).sum()), at) == pytest.approx(3 * at**2, abs=1e-8)


# divergences


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
@pytest.mark.parametrize("tau", TAUS)
def test_divergence_is_positive_zero_at_equality_and_softens_both_sides(divergence, tau, pair):
    student, teacher = pair
    assert divergence(student, teacher, tau) > 0
    assert divergence(teacher, teacher, tau) == pytest.approx(0, abs=1e-15)
    assert divergence(student, teacher, tau) == pytest.approx(
        divergence(student / tau, teacher / tau, 1.0)
    )


def test_defaults(pair):
    """tau = 1, JSD 0.5, skews 0.1, AKL's head 0.5, TAID's start 0.4."""
    for divergence in ALL_DIVERGENCES:
        assert divergence(*pair) == divergence(*pair, tau=1.0) != divergence(*pair, tau=2.0)
    assert divergences.jsd(*pair) == divergences.jsd(*pair, beta=0.5)
    assert divergences.skew_kl(*pair) == divergences.skew_kl(*pair, alpha=0.1)
    assert divergences.skew_reverse_kl(*pair) == divergences.skew_reverse_kl(*pair, alpha=0.1)
    assert divergences.akl(*pair) == divergences.akl(*pair, mass=0.5)
    assert divergences.taid(*pair) == divergences.taid(*pair, t=0.4)
    assert divergences.taid_next(0.4, 0.0, 2.0, 2.0, 0.5)[0] == pytest.approx(0.7)


def test_forward_kl_agrees_with_torch_and_its_cotangent(pair):
    student, teacher = pair
    for tau in TAUS:
        expected = torch.nn.functional.kl_div(
            torch.log_softmax(torch.tensor(student) / tau, dim=-1),
            torch.log_softmax(torch.tensor(teacher) / tau, dim=-1),
            reduction="sum",
            log_target=True,
        )
        assert divergences.forward_kl(student, teacher, tau) == pytest.approx(float(expected))
        slope = gradient(lambda z, tau=tau: divergences.forward_kl(z, teacher, tau), student)
        assert slope == pytest.approx((softmax(student, tau) - softmax(teacher, tau)) / tau)


def test_kl_directions_and_supports():
    student, teacher = logits_of(0.5, 0.5, 0.0), logits_of(0.25, 0.25, 0.5)
    assert divergences.reverse_kl(student, teacher) == pytest.approx(math.log(2))
    assert divergences.forward_kl(student, teacher) == math.inf
    assert divergences.kl(softmax(teacher), softmax(student)) == math.inf


def test_jsd_limits_symmetry_and_bound(pair):
    student, teacher = pair
    forward = divergences.forward_kl(student, teacher)
    reverse = divergences.reverse_kl(student, teacher)
    small = 1e-6
    assert divergences.jsd(student, teacher, beta=0) == forward
    assert divergences.jsd(student, teacher, beta=1) == reverse
    near_0 = divergences.jsd(student, teacher, beta=small) / small
    near_1 = divergences.jsd(student, teacher, beta=1 - small) / small
    assert near_0 == pytest.approx(forward, rel=1e-4)
    assert near_1 == pytest.approx(reverse, rel=1e-4)
    assert forward != pytest.approx(reverse, rel=1e-2)
    half = divergences.jsd(student, teacher)
    assert half == pytest.approx(divergences.jsd(teacher, student))
    assert half < math.log(2)


def test_jsd_is_a_mixture_of_the_skew_divergences(pair):
    for beta in [0.1, 0.5, 0.8]:
        mixture = beta * divergences.skew_kl(*pair, alpha=beta)
        mixture += (1 - beta) * divergences.skew_reverse_kl(*pair, alpha=1 - beta)
        assert divergences.jsd(*pair, beta=beta) == pytest.approx(mixture)


def test_skew_ends(pair):
    student, teacher = pair
    for skew, plain in [
        (divergences.skew_kl, divergences.forward_kl),
        (divergences.skew_reverse_kl, divergences.reverse_kl),
    ]:
        assert skew(student, teacher, alpha=0) == pytest.approx(plain(student, teacher))
        assert skew(student, teacher, alpha=1) == pytest.approx(0, abs=1e-15)
        assert skew(student, teacher) < plain(student, teacher)


def test_total_variation(pair):
    overlap = np.minimum(softmax(pair[0]), softmax(pair[1])).sum()
    assert divergences.total_variation(*pair) == pytest.approx(1 - overlap)
    assert divergences.total_variation(logits_of(1, 0), logits_of(0, 1)) == 1
    assert divergences.total_variation(*pair) ** 2 <= divergences.forward_kl(*pair) / 2


def test_akl_head_and_weights(pair):
    assert list(divergences.akl_head(logits_of(0.1, 0.6, 0.3))) == [False, True, False]
    assert list(divergences.akl_head(logits_of(0.3, 0.15, 0.1, 0.45))) == [False] * 3 + [True]
    spread = logits_of(0.35, 0.17, 0.12, 0.12, 0.12, 0.12)
    assert list(divergences.akl_head(spread)) == [True] + [False] * 5
    assert list(divergences.akl_head(spread, 1.5)) == [True, True] + [False] * 4
    assert list(divergences.akl_head(np.zeros(5))) == [True, True, False, False, False]
    teacher, student = logits_of(0.4, 0.3, 0.2, 0.1), logits_of(0.5, 0.1, 0.3, 0.1)
    assert divergences.akl_weights(student, teacher) == pytest.approx((0.25, 0.75))
    forward = divergences.forward_kl(student, teacher)
    reverse = divergences.reverse_kl(student, teacher)
    assert divergences.akl(student, teacher) == pytest.approx(0.25 * forward + 0.75 * reverse)
    assert divergences.akl_weights(student, teacher, mass=1.0) == pytest.approx((1, 0))
    assert sum(divergences.akl_weights(*pair)) == pytest.approx(1)


def test_taid_ends_and_cotangent(pair):
    student, teacher = pair
    assert divergences.taid(student, teacher, t=1) == divergences.forward_kl(student, teacher)
    assert divergences.taid(student, teacher, t=0) == 0
    for tau in TAUS:
        target = divergences.taid_target(student, teacher, 0.4)
        slope = gradient(lambda z, g=target, tau=tau: divergences.forward_kl(z, g, tau), student)
        assert slope == pytest.approx((softmax(student, tau) - softmax(target, tau)) / tau)


def test_taid_schedule():
    assert divergences.taid_next(0.4, 0.0, None, 2.0, 0.5) == (0.4, 0.0)
    t, momentum = divergences.taid_next(0.4, 0.1, 2.0, 1.5, 0.0)
    assert momentum == pytest.approx(0.99 * 0.1 + 0.01 * 0.25)
    assert t == pytest.approx(0.4 + 5e-4 * 0.6 / (1 + math.exp(-momentum)))
    assert divergences.taid_next(0.4, 0.0, 2.0, 2.0, 0.5)[0] == pytest.approx(0.7)
    assert divergences.taid_next(0.9, 0.0, 2.0, 2.0, 0.5)[0] > 0.9
    assert divergences.taid_next(1.0, 0.0, 2.0, 2.0, 1.0)[0] == 1


# gates


def test_greedy_gate_at_k_of_one_of_all_and_between(batch):
    student, teacher, mask = batch
    agree = student.argmax(-1) == teacher.argmax(-1)
    assert (gates.speckd_greedy(student, teacher, 1) == agree).all()
    assert gates.token_acceptance_rate(gates.speckd_greedy(student, teacher, CLASSES), mask) == 1
    rates = [gates.speckd_greedy(student, teacher, k).mean() for k in range(1, CLASSES + 1)]
    assert rates == sorted(rates)
    assert rates[0] < rates[2] < 1
    assert (
        gates.speckd_greedy(7 * student, teacher, 3) == gates.speckd_greedy(student, teacher, 3)
    ).all()


def test_greedy_gate_counts_strictly_larger_logits():
    student = np.array([[[0.0, 0.0, 9.0, 0.0]]])
    teacher = np.array([[[5.0, 1.0, 1.0, 1.0]]])
    assert not gates.speckd_greedy(student, teacher, 1).any()
    assert gates.speckd_greedy(student, teacher, 2).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sampling_gate_closed_form_by_enumeration(k, random):
    student, teacher = random.normal(size=(2, 1, 1, 3))
    student_probs, teacher_probs = softmax(student[0, 0]), softmax(teacher[0, 0])
    total = 0.0
    for tokens in itertools.product(range(3), repeat=k):
        drawn = math.prod(student_probs[v] for v in tokens)
        refused = math.prod(1 - min(1, teacher_probs[v] / student_probs[v]) for v in tokens)
        total += drawn * (1 - refused)
    assert gates.speckd_acceptance(student, teacher, k)[0, 0] == pytest.approx(total)


def test_sampling_gate_by_monte_carlo(batch, random):
    student, teacher, mask = batch
    rate = gates.token_acceptance_rate
    draws = [rate(gates.speckd_sampled(student, teacher, 2, random), mask) for _ in range(400)]
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert (
        abs(np.mean(draws) - rate(gates.speckd_acceptance(student, teacher, 2), mask)) < 3 * error
    )


def test_sampling_gate_at_its_ends(batch):
    student, teacher, _ = batch
    assert gates.speckd_acceptance(teacher, teacher, 2) == pytest.approx(1)
    apart = gates.speckd_expected(logits_of(1, 0)[None, None], logits_of(0, 1)[None, None], 5, 0.01)
    assert apart.item() == 0.01
    assert (gates.speckd_expected(student, teacher, 2, 1.0) == 1).all()
    assert gates.speckd_expected(student, teacher, 2, 0.0) == pytest.approx(
        gates.speckd_acceptance(student, teacher, 2)
    )


def test_gated_loss_is_linear_in_beta_and_ungated_at_one(batch):
    student, teacher, mask = batch
    values = per_position(divergences.forward_kl, student, teacher)
    accepted = gates.speckd_greedy(student, teacher, 2)

    def loss(beta: float) -> float:
        return positions.sequence_mean(values, gates.floored(accepted, beta), mask)

    ungated = positions.sequence_mean(values, np.ones_like(values), mask)
    assert loss(1.0) == ungated
    assert loss(0.3) == pytest.approx(0.3 * ungated + 0.7 * loss(0.0))
    assert 0 < loss(0.0) < ungated


def test_entropy_and_confidence_gates():
    teacher = np.stack([np.zeros(4), logits_of(0.7, 0.1, 0.1, 0.1), logits_of(1, 0, 0, 0)])[None]
    assert gates.entropy_soft(teacher)[0, [0, 2]] == pytest.approx([0, 1])
    assert list(gates.entropy_hard(teacher, 1.0)[0]) == [False, True, True]
    assert list(gates.confidence(teacher, 0.6)[0]) == [False, True, True]
    assert list(gates.confidence(teacher, 0.75)[0]) == [False, False, True]
    surest = max(softmax(teacher[0, 1]))
    assert not gates.confidence(teacher[:, 1:2], surest).any()
    assert not gates.entropy_hard(teacher[:, 1:2], entropy(teacher[0, 1])).any()
    near = np.stack([logits_of(0.69, 0.31), logits_of(0.71, 0.29)])[None]
    assert list(gates.confidence(near)[0]) == [False, True]


def test_top_fraction_ranks_only_the_mask_and_keeps_ties():
    scores = np.array([[1.0, 2.0, 3.0, 4.0, 9.0]])
    mask = np.array([[True, True, True, True, False]])
    assert list(gates.top_fraction(scores, 0.5, mask)[0]) == [False, False, True, True, False]
    assert gates.top_fraction(scores, 0.01, mask).sum() == 1
    assert (gates.top_fraction(scores, 1.0, mask) == mask).all()
    assert gates.top_fraction(np.ones((1, 5)), 0.2, mask).sum() == 4


def test_ranking_gates_prefer_what_they_say(batch):
    student, teacher, mask = batch
    scores = per_position(entropy, student)
    kept = gates.student_entropy(student, mask)
    assert kept.sum() == 2
    assert scores[kept].min() > scores[mask & ~kept].max()

    distance = gates.hellinger_distance(student[0, 0], teacher[0, 0])
    overlap = math.fsum(np.sqrt(softmax(student[0, 0]) * softmax(teacher[0, 0])))
    assert distance == pytest.approx(math.sqrt(1 - overlap))
    scores = per_position(gates.hellinger_distance, student, teacher)
    kept = gates.hellinger(student, teacher, mask, 0.3)
    assert kept.sum() == 3
    assert scores[kept].min() > scores[mask & ~kept].max()

    position = student[0, 0], teacher[0, 0]
    assert gates.adaspec_score(*position, reference=position[0]) == 0
    assert gates.adaspec_score(*position, reference=position[1]) == divergences.forward_kl(
        *position
    )
    kept = gates.adaspec(student, teacher, teacher, mask)
    scores = per_position(divergences.forward_kl, student, teacher)
    assert (kept == gates.top_fraction(scores, 0.4, mask)).all()
    assert kept.sum() == 4


# reductions


def test_reductions_by_hand():
    values = np.array([[1.0, 2.0, 4.0], [8.0, 100.0, 100.0], [100.0, 100.0, 100.0]])
    weights = np.array([[1.0, 0.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 1.0]])
    mask = np.array([[True, True, True], [True, False, False], [False, False, False]])
    assert positions.sequence_mean(values, weights, mask) == pytest.approx((5 / 3 + 4) / 2)
    assert positions.token_mean(values, weights, mask) == pytest.approx(9 / 4)
    assert positions.accepted_mean(values, weights, mask) == pytest.approx((5 / 2 + 8) / 2)
    weights[1, 0] = 0
    assert positions.accepted_mean(values, weights, mask) == pytest.approx((5 / 2 + 0) / 2)
    assert gates.token_acceptance_rate(weights > 0, mask) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(
    "reduce", [positions.sequence_mean, positions.token_mean, positions.accepted_mean]
)
def test_padding_changes_no_reduction(reduce, random):
    values, weights = random.random(size=(2, 3, 4))
    mask = np.arange(4) < np.array([4, 1, 2])[:, None]
    wider = [np.pad(x, ((1, 2), (3, 1)), constant_values=7.0) for x in (values, weights)]
    padded = reduce(*wider, np.pad(mask, ((1, 2), (3, 1))))
    assert padded == pytest.approx(reduce(values, weights, mask))
