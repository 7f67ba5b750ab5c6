"""Divergences between teacher and student at one position.

Each takes student logits [V], teacher logits [V] and the softening tau, and compares
softmax(student / tau) with softmax(teacher / tau), in nats.

None multiplies by tau^2: a loss that keeps its gradient's size as tau grows is
tau**2 * divergence, and the caller writes that factor.
"""

import math

import numpy as np

from .softmax import log_softmax, softmax


def kl(first: np.ndarray, second: np.ndarray) -> float:
    """KL(first || second) of two probability vectors [V]; 0 log 0 = 0; inf where `second`
    lacks a class that `first` has."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        if a > 0:
            total += a * (math.log(a) - math.log(b)) if b > 0 else math.inf
    return total


def forward_kl(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0) -> float:
    """KL(teacher || student), from log-probabilities so that a student's tiny probability
    does not become 0."""
    student_logp, teacher_logp = log_softmax(student, tau), log_softmax(teacher, tau)
    return math.fsum(
        math.exp(t) * (t - s)
        for s, t in zip(student_logp, teacher_logp, strict=True)
        if math.exp(t) > 0
    )


def reverse_kl(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0) -> float:
    """KL(student || teacher)."""
    return forward_kl(teacher, student, tau)


def jsd(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, beta: float = 0.5) -> float:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    beta = 0 means forward KL and beta = 1 reverse KL, by definition: the formula itself is 0
    there, while jsd / beta tends to forward KL as beta -> 0 and jsd / (1 - beta) to reverse KL
    as beta -> 1.
    """
    if beta == 0:
        return forward_kl(student, teacher, tau)
    if beta == 1:
        return reverse_kl(student, teacher, tau)
    student_probs, teacher_probs = softmax(student, tau), softmax(teacher, tau)
    mixture = beta * teacher_probs + (1 - beta) * student_probs
    return beta * kl(teacher_probs, mixture) + (1 - beta) * kl(student_probs, mixture)


def skew_kl(
    student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, alpha: float = 0.1
) -> float:
    """KL(teacher || alpha teacher + (1 - alpha) student)."""
    student_probs, teacher_probs = softmax(student, tau), softmax(teacher, tau)
    return kl(teacher_probs, alpha * teacher_probs + (1 - alpha) * student_probs)


def skew_reverse_kl(
    student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, alpha: float = 0.1
) -> float:
    """KL(student || (1 - alpha) teacher + alpha student)."""
    student_probs, teacher_probs = softmax(student, tau), softmax(teacher, tau)
    return kl(student_probs, (1 - alpha) * teacher_probs + alpha * student_probs)


def total_variation(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0) -> float:
    """Half the sum over classes of |teacher - student|, in [0, 1]."""
    student_probs, teacher_probs = softmax(student, tau), softmax(teacher, tau)
    return 0.5 * math.fsum(abs(t - s) for s, t in zip(student_probs, teacher_probs, strict=True))


def alpha_beta(
    student: np.ndarray,
    teacher: np.ndarray,
    tau: float = 1.0,
    alpha: float = 0.2,
    beta: float = 0.7,
) -> float:
    """-1 / (alpha beta) sum (p^alpha q^beta - alpha / s p^s - beta / s q^s), s = alpha + beta.

    p is the teacher, q the student. Its limits are (1 / beta^2) sum (q^beta (beta log(q / p) - 1)
    + p^beta) as alpha -> 0, which is reverse KL at beta = 1, and the same with p and q swapped as
    beta -> 0, which is forward KL at alpha = 1.
    """
    logp, logq = log_softmax(teacher, tau), log_softmax(student, tau)
    if alpha == 0 or beta == 0:
        power, first, second = (beta, logq, logp) if alpha == 0 else (alpha, logp, logq)
        return (
            math.fsum(
                math.exp(power * a) * (power * (a - b) - 1) + math.exp(power * b)
                for a, b in zip(first, second, strict=True)
            )
            / power**2
        )
    total = alpha + beta
    return math.fsum(
        math.exp(total * p)
        * (alpha + beta * math.exp(total * (q - p)) - total * math.exp(beta * (q - p)))
        for p, q in zip(logp, logq, strict=True)
    ) / (total * alpha * beta)


def akl_head(teacher: np.ndarray, tau: float = 1.0, mass: float = 0.5) -> np.ndarray:
    """The head [V] bool: the teacher's top class, then the next ones while the cumulative
    probability, their own included, is at most `mass`. Equal classes: the lower index first."""
    probs = softmax(teacher, tau)
    head = np.zeros(len(probs), dtype=bool)
    cumulative = 0.0
    for rank, v in enumerate(sorted(range(len(probs)), key=lambda v: -probs[v])):
        cumulative += probs[v]
        head[v] = rank == 0 or cumulative <= mass
    return head


def akl_weights(
    student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, mass: float = 0.5
) -> tuple[float, float]:
    """The weights of forward and of reverse KL: the shares of sum |teacher - student| that lie
    on the head and on the tail. Where the two distributions are equal both KLs are 0 and the
    shares have no meaning: (0.5, 0.5) is returned."""
    gap = np.abs(softmax(teacher, tau) - softmax(student, tau))
    head = akl_head(teacher, tau, mass)
    if gap.sum() == 0:
        return 0.5, 0.5
    return float(gap[head].sum() / gap.sum()), float(gap[~head].sum() / gap.sum())


def akl(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, mass: float = 0.5) -> float:
    """Adaptive KL: akl_weights times (forward KL, reverse KL). The weights are constants to the
    gradient."""
    on_forward, on_reverse = akl_weights(student, teacher, tau, mass)
    return on_forward * forward_kl(student, teacher, tau) + on_reverse * reverse_kl(
        student, teacher, tau
    )


def taid_target(student: np.ndarray, teacher: np.ndarray, t: float) -> np.ndarray:
    """The intermediate teacher's logits [V]: (1 - t) student + t teacher. A constant to the
    gradient."""
    return (1 - t) * student + t * teacher


def taid(student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, t: float = 0.4) -> float:
    """Forward KL to the intermediate teacher. As the target is a constant to the gradient, the
    cotangent is (softmax(student / tau) - softmax(target / tau)) / tau."""
    return forward_kl(student, taid_target(student, teacher, t), tau)


def taid_next(
    t: float,
    momentum: float,
    previous: float | None,
    loss: float,
    progress: float,
    start: float = 0.4,
    end: float = 1.0,
    alpha: float = 5e-4,
    decay: float = 0.99,
) -> tuple[float, float]:
    """The adaptive (t, momentum) after a step with this loss, `progress` in [0, 1].

    With J the loss:  d = max(-1, (J_prev - J) / J_prev);  m = decay m + (1 - decay) d;
    t = min(end, max(linear, t + alpha sigmoid(m) (1 - t))),  linear = start + progress
    (end - start). The first step has no previous loss (None): it changes neither.
    """
    if previous is None:
        return t, momentum
    momentum = decay * momentum + (1 - decay) * max(-1.0, (previous - loss) / previous)
    linear = start + progress * (end - start)
    faster = t + alpha * (1 / (1 + math.exp(-momentum))) * (1 - t)
    return min(end, max(linear, faster)), momentum
