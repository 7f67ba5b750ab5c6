"""The split of distillation into task, target and non-target knowledge, at one position.

Student and teacher are logits [V] float64, label a class index, tau the softening. With

    task      softmax(student)              soft     softmax(student / tau)
    ref       softmax(teacher / tau)        hats     renormalised over the classes but the label

    TOG   -log task_label
    TCKD  tau^2 KL([ref_label, 1 - ref_label] || [soft_label, 1 - soft_label])
    NCKD  tau^2 KL(ref_hat || soft_hat)
    KD    tau^2 KL(ref || soft)  =  TCKD + (1 - ref_label) NCKD

Here tau^2 is part of every term but TOG. `kept` [V] bool restricts NCKD, and nothing else, to
some of the non-label classes; None keeps them all.
"""

import math

import numpy as np

from tests.reference.divergences import forward_kl
from tests.reference.softmax import log_softmax, logsumexp, softmax


def others(classes: int, label: int) -> np.ndarray:
    """The non-label classes, [V] bool."""
    return np.arange(classes) != label


def kept_classes(classes: int, label: int, kept: np.ndarray | None) -> np.ndarray:
    """The classes that NCKD compares, [V] bool. The label among them is an error, and so is
    none at all."""
    kept = others(classes, label) if kept is None else kept
    if kept[label] or not kept.any():
        raise ValueError("NCKD needs at least one class, and never the label")
    return kept


def log_odds(logits: np.ndarray, label: int, tau: float = 1.0) -> float:
    """log(prob_label / (1 - prob_label)) = z_label - logsumexp of the other z, z = logits / tau."""
    softened = np.asarray(logits, dtype=np.float64) / tau
    return float(softened[label] - logsumexp(softened[others(len(logits), label)]))


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))), finite for every finite x."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def label_prob(logits: np.ndarray, label: int, tau: float = 1.0) -> float:
    """The softened probability of the label."""
    return math.exp(log_sigmoid(log_odds(logits, label, tau)))


def rest_prob(logits: np.ndarray, label: int, tau: float = 1.0) -> float:
    """1 - label_prob, exact where the label's probability is next to 1."""
    return math.exp(log_sigmoid(-log_odds(logits, label, tau)))


def hat(logits: np.ndarray, kept: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """The softened probabilities renormalised over the kept classes, 0 elsewhere: [V]."""
    probs = np.zeros(len(logits))
    probs[kept] = softmax(logits[kept], tau)
    return probs


def task_ce(student: np.ndarray, label: int) -> float:
    """TOG's loss: cross-entropy with the label, at tau = 1."""
    return float(-log_softmax(student)[label])


def tckd(student: np.ndarray, teacher: np.ndarray, label: int, tau: float = 1.0) -> float:
    """Target knowledge: a two-class KL, from log-odds. Finite for every finite logit."""
    soft, ref = log_odds(student, label, tau), log_odds(teacher, label, tau)
    on_label = math.exp(log_sigmoid(ref)) * (log_sigmoid(ref) - log_sigmoid(soft))
    on_rest = math.exp(log_sigmoid(-ref)) * (log_sigmoid(-ref) - log_sigmoid(-soft))
    return tau**2 * (on_label + on_rest)


def nckd(
    student: np.ndarray,
    teacher: np.ndarray,
    label: int,
    tau: float = 1.0,
    kept: np.ndarray | None = None,
) -> float:
    """Non-target knowledge: KL over the kept classes alone, dropped before the softmax."""
    kept = kept_classes(len(student), label, kept)
    return tau**2 * forward_kl(student[kept], teacher[kept], tau)


def tckd_naive(student: np.ndarray, teacher: np.ndarray, label: int, tau: float = 1.0) -> float:
    """TCKD from probabilities, as defined. inf or NaN once a probability rounds to 0 or 1."""
    soft, ref = softmax(student, tau)[label], softmax(teacher, tau)[label]
    with np.errstate(all="ignore"):
        value = ref * np.log(ref / soft) + (1 - ref) * np.log((1 - ref) / (1 - soft))
    return float(tau**2 * value)


def nckd_naive(
    student: np.ndarray,
    teacher: np.ndarray,
    label: int,
    tau: float = 1.0,
    kept: np.ndarray | None = None,
) -> float:
    """NCKD from probabilities, as defined: each divided by the kept classes' mass."""
    kept = kept_classes(len(student), label, kept)
    soft, ref = softmax(student, tau)[kept], softmax(teacher, tau)[kept]
    with np.errstate(all="ignore"):
        soft_hat, ref_hat = soft / soft.sum(), ref / ref.sum()
        value = (ref_hat * np.log(ref_hat / soft_hat)).sum()
    return float(tau**2 * value)


def kd(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0) -> float:
    """The whole: tau^2 KL(ref || soft)."""
    return tau**2 * forward_kl(student, teacher, tau)


def nckd_weight(teacher: np.ndarray, label: int, tau: float = 1.0) -> float:
    """1 - ref_label, the weight that makes the parts add up to KD."""
    return rest_prob(teacher, label, tau)


def dropped_mass(teacher: np.ndarray, label: int, kept: np.ndarray, tau: float = 1.0) -> float:
    """The teacher's softened probability on non-label classes that NCKD does not see."""
    return float(softmax(teacher, tau)[others(len(teacher), label) & ~kept].sum())


# The cotangents: gradients of the three terms, unweighted, with respect to the student's logits.


def task_cotangent(student: np.ndarray, label: int) -> np.ndarray:
    """TOG = task - onehot(label): [V]."""
    cotangent = softmax(student)
    cotangent[label] = -rest_prob(student, label)
    return cotangent


def tckd_cotangent(
    student: np.ndarray, teacher: np.ndarray, label: int, tau: float = 1.0
) -> np.ndarray:
    """TCG: tau (soft_label - ref_label) at the label, minus that times soft_hat elsewhere."""
    gap = tau * (label_prob(student, label, tau) - label_prob(teacher, label, tau))
    cotangent = -gap * hat(student, others(len(student), label), tau)
    cotangent[label] = gap
    return cotangent


def nckd_cotangent(
    student: np.ndarray,
    teacher: np.ndarray,
    label: int,
    tau: float = 1.0,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """NCG: tau (soft_hat - ref_hat) on the kept classes, 0 at the label and where dropped."""
    kept = kept_classes(len(student), label, kept)
    return tau * (hat(student, kept, tau) - hat(teacher, kept, tau))


def kd_cotangent(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """tau (soft - ref) = TCG + (1 - ref_label) NCG."""
    return tau * (softmax(student, tau) - softmax(teacher, tau))


def dkd_warm_up(epoch: float, length: float = 20.0) -> float:
    """min(epoch / length, 1)."""
    return min(epoch / length, 1.0)


def dkd(
    student: np.ndarray,
    teacher: np.ndarray,
    label: int,
    tau: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    warm_up: float = 1.0,
    kept: np.ndarray | None = None,
) -> float:
    """Decoupled KD: warm_up (alpha TCKD + beta NCKD), free weights in place of 1 - ref_label."""
    target = tckd(student, teacher, label, tau)
    return warm_up * (alpha * target + beta * nckd(student, teacher, label, tau, kept))


def released_kd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, tau: float
) -> tuple[float, float]:
    """The released code's (TCKD, NCKD) terms of a batch [B, V], labels [B]: the weight and the
    NCKD are averaged apart, mean(1 - ref_label) mean(NCKD), and no KD weight is applied."""
    batch = list(zip(student, teacher, labels, strict=True))
    target = np.mean([tckd(s, t, y, tau) for s, t, y in batch])
    weight = np.mean([nckd_weight(t, y, tau) for _, t, y in batch])
    return float(target), float(weight * np.mean([nckd(s, t, y, tau) for s, t, y in batch]))
