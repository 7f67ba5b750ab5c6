"""AdaKD and SE-KD, one position and one row at a time.

Logits are [N, V] float64 of the positions of a micro-batch (AdaKD) or of a row (SE-KD).
"""

import math

import numpy as np

from .divergences import forward_kl
from .gates import hellinger_distance
from .softmax import entropy


def adakd_selected(student: np.ndarray, teacher: np.ndarray, fraction: float) -> list[int]:
    """The numbers of the hardest positions: a fraction of them, rounded down, at least one."""
    difficulty = [hellinger_distance(s, t) for s, t in zip(student, teacher, strict=True)]
    count = max(1, int(fraction * len(difficulty)))
    return sorted(range(len(difficulty)), key=lambda i: -difficulty[i])[:count]


def adakd_temperatures(
    student: np.ndarray, teacher: np.ndarray, fraction: float, strength: float
) -> dict[int, float]:
    """The temperature of each selected position: exp(-strength tanh(log(s / median)))."""
    selected = adakd_selected(student, teacher, fraction)
    difficulty = {i: hellinger_distance(student[i], teacher[i]) for i in selected}
    median = sorted(difficulty.values())[(len(selected) - 1) // 2]  # the lower of two
    return {i: math.exp(-strength * math.tanh(math.log(s / median))) for i, s in difficulty.items()}


def adakd_loss(student: np.ndarray, teacher: np.ndarray, fraction: float, strength: float) -> float:
    """The mean over the selected positions of tau^2 KL(teacher / tau || student / tau)."""
    temperatures = adakd_temperatures(student, teacher, fraction, strength)
    return float(
        np.mean(
            [
                tau**2 * forward_kl(student[i] / tau, teacher[i] / tau)
                for i, tau in temperatures.items()
            ]
        )
    )


def adakd_fractions(
    losses: list[float],
    warmup: int,
    decay: float = 0.99,
    tolerance: float = 0.05,
    step: float = 0.05,
    least: float = 0.1,
) -> list[float]:
    """The fraction after each optimizer step.

    After the warm-up's steps the running mean is noted. Whenever the mean has left the noted one
    by more than the tolerance, the fraction shrinks if it fell and grows if it rose, and the mean
    is noted anew.
    """
    fraction, mean, noted, found = 1.0, None, None, []
    for number, loss in enumerate(losses, start=1):
        mean = loss if mean is None else decay * mean + (1 - decay) * loss
        if noted is None:
            noted = mean if number > warmup else None
        elif mean > noted * (1 + tolerance):
            fraction, noted = min(1.0, fraction * (1 + step)), mean
        elif mean < noted * (1 - tolerance):
            fraction, noted = max(least, fraction * (1 - step)), mean
        found.append(fraction)
    return found


def se_kd_selected(student: np.ndarray, fraction: float, window: float = 1.0) -> set[int]:
    """The numbers of the row's selected positions: ceil(k n) neighbours in the order of entropy.

    The window is at the highest entropies for 1, and at the lowest ones for 0.
    """
    ascending = sorted(range(len(student)), key=lambda i: entropy(student[i]))
    count = math.ceil(fraction * len(student))
    first = math.floor((len(student) - count) * window)
    return set(ascending[first : first + count])


def se_kd_queue_selected(
    steps: list[np.ndarray], fraction: float, queue: int
) -> list[set[int] | None]:
    """The numbers of the positions that each step keeps; None for the first one, without a queue.

    The threshold is the quantile 1 - fraction of the last entropies of the steps before, between
    its two neighbours where it falls between them.
    """
    found: list[set[int] | None] = []
    entropies: list[float] = []
    for student in steps:
        own = [entropy(logits) for logits in student]
        if entropies:
            ascending = sorted(entropies[-queue:])
            place = (1 - fraction) * (len(ascending) - 1)
            low, part = int(place), place - int(place)
            high = min(low + 1, len(ascending) - 1)
            threshold = (1 - part) * ascending[low] + part * ascending[high]
            found.append({n for n, each in enumerate(own) if each >= threshold})
        else:
            found.append(None)
        entropies += own
    return found
