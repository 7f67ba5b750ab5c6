"""Which positions receive the distillation loss, and how much.

Logits are [B, T, V] float64, mask [B, T] bool. A decision is [B, T] bool, a weight [B, T] in
[0, 1]; both are constants to the gradient and both are taken at temperature 1, whatever tau
softens the loss. A position outside the mask is computed like any other, except where a gate
ranks the whole batch: it is then not ranked and gets 0.
"""

import math

import numpy as np

from .divergences import forward_kl, total_variation
from .positions import per_position
from .softmax import entropy, softmax


def floored(accepted: np.ndarray, beta: float) -> np.ndarray:
    """Weight 1 where accepted, beta elsewhere."""
    return np.where(accepted, 1.0, beta)


def speckd_greedy(student: np.ndarray, teacher: np.ndarray, k: int) -> np.ndarray:
    """Accepted [B, T]: fewer than k teacher logits are strictly larger than the teacher's logit
    of the student's argmax (the first, if several are equal)."""

    def accepted(student_v: np.ndarray, teacher_v: np.ndarray) -> bool:
        proposal = int(np.argmax(student_v))
        return sum(1 for z in teacher_v if z > teacher_v[proposal]) < k

    return per_position(accepted, student, teacher)


def speckd_acceptance(student: np.ndarray, teacher: np.ndarray, k: int) -> np.ndarray:
    """P(accepted) [B, T] under sampling verification: 1 - TV^k.

    One draw from the student is accepted with sum_v student_v min(1, teacher_v / student_v)
    = sum_v min(student_v, teacher_v) = 1 - TV, and the k draws are independent.
    """
    return per_position(lambda s, t: 1 - total_variation(s, t) ** k, student, teacher)


def speckd_sampled(
    student: np.ndarray, teacher: np.ndarray, k: int, random: np.random.Generator
) -> np.ndarray:
    """Accepted [B, T], drawn as the definition says: k tokens from the student, each accepted
    iff u < min(1, teacher / student); the position iff any is."""

    def accepted(student_v: np.ndarray, teacher_v: np.ndarray) -> bool:
        student_probs, teacher_probs = softmax(student_v), softmax(teacher_v)
        tokens = random.choice(len(student_probs), size=k, p=student_probs)
        return any(random.random() < min(1, teacher_probs[v] / student_probs[v]) for v in tokens)

    return per_position(accepted, student, teacher)


def speckd_expected(student: np.ndarray, teacher: np.ndarray, k: int, beta: float) -> np.ndarray:
    """The mean weight under sampling verification, beta + (1 - beta)(1 - TV^k): no variance."""
    return beta + (1 - beta) * speckd_acceptance(student, teacher, k)


def token_acceptance_rate(accepted: np.ndarray, mask: np.ndarray) -> float:
    """Mean over sequences of (1 / |y|) sum_t accepted_t; rows with an empty mask not counted."""
    return float(np.mean([accepted[b][mask[b]].mean() for b in range(len(mask)) if mask[b].any()]))


def entropy_hard(teacher: np.ndarray, threshold: float) -> np.ndarray:
    """Accepted [B, T]: the teacher's entropy, in nats, is below the threshold."""
    return per_position(lambda t: entropy(t) < threshold, teacher)


def entropy_soft(teacher: np.ndarray) -> np.ndarray:
    """Weight 1 - H(teacher) / log V."""
    classes = teacher.shape[-1]
    return per_position(lambda t: 1 - entropy(t) / math.log(classes), teacher)


def confidence(teacher: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    """Accepted [B, T]: the teacher's largest probability is above the threshold."""
    return per_position(lambda t: softmax(t).max() > threshold, teacher)


def kept_count(fraction: float, positions: int) -> int:
    """How many of the masked positions a top fraction keeps: the nearest whole number (a half
    goes to the even one), and at least one."""
    return max(1, round(fraction * positions))


def top_fraction(scores: np.ndarray, fraction: float, mask: np.ndarray) -> np.ndarray:
    """Accepted [B, T]: the highest-scoring fraction of all the batch's masked positions. All
    that equal the last one kept are kept, so that the order of the rows decides nothing."""
    ranked = sorted(scores[mask], reverse=True)
    smallest = ranked[kept_count(fraction, len(ranked)) - 1]
    return mask & (scores >= smallest)


def student_entropy(student: np.ndarray, mask: np.ndarray, fraction: float = 0.2) -> np.ndarray:
    """Accepted [B, T]: the positions where the student is the least sure."""
    return top_fraction(per_position(entropy, student), fraction, mask)


def hellinger_distance(student: np.ndarray, teacher: np.ndarray) -> float:
    """sqrt(0.5 sum_v (sqrt teacher_v - sqrt student_v)^2) in [0, 1]. Logits [V]."""
    gaps = np.sqrt(softmax(teacher)) - np.sqrt(softmax(student))
    return math.sqrt(0.5 * math.fsum(gaps**2))


def hellinger(
    student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, fraction: float
) -> np.ndarray:
    """Accepted [B, T]: the hardest positions, by the distance of student and teacher."""
    return top_fraction(per_position(hellinger_distance, student, teacher), fraction, mask)


def adaspec_score(student: np.ndarray, teacher: np.ndarray, reference: np.ndarray) -> float:
    """KL(teacher || student) - KL(teacher || reference): what there is still to gain over a
    reference model. Logits [V]."""
    return forward_kl(student, teacher) - forward_kl(reference, teacher)


def adaspec(
    student: np.ndarray,
    teacher: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray,
    fraction: float = 0.4,
) -> np.ndarray:
    """Accepted [B, T]: the positions with the most left to gain."""
    scores = per_position(adaspec_score, student, teacher, reference)
    return top_fraction(scores, fraction, mask)
