"""Paired differences between two methods, with intervals over held-out rows and seeds.

Both models are measured on the same rows, so each resample draws the same rows for both: the
difficulty of a row cancels out of the difference. Rows are many, so a bootstrap over them has its
nominal coverage. Seeds are few, and a bootstrap of three would exclude 0 whenever all three agree
in sign; their variation comes from Student's t of their differences instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from kdcore.runs.results import Difference, Measured

LEVEL = 0.95
"""Coverage of the intervals."""


def paired_differences(
    ours: Sequence[Measured], theirs: Sequence[Measured], draws: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Compute, for each figure, the mean over seeds of ours minus theirs, with its interval.

    With g_s the difference of seed s and m their mean, the interval is
    m - hypot(m - low, h) to m + hypot(high - m, h), where low and high are the percentiles of m
    over the resamples of rows, and h = t(S - 1) sd(g) / sqrt(S). With one seed h is 0: the interval
    then does not include the variation of training.

    Args:
        ours: S measurements, one for each seed, of the same R rows.
        theirs: The other method's S measurements, in the same order of seeds.
        draws: Number of resamples; each draws R rows (or answers) with replacement.
        seed: The seed of the resamples.

    Returns:
        Figure -> difference.

    Raises:
        ValueError: The measurements have different rows or seeds.
    """
    columns = paired_columns(ours, theirs)
    generator = np.random.default_rng(seed)
    # Count of each row in each resample, [1 + draws, R]; the first is the data itself.
    rows = {
        size: np.vstack([np.ones(size), _counts(generator, draws, size)])
        for size in dict.fromkeys([len(ours[0].lengths), *(c.shape[-1] for c in columns.values())])
    }
    found = {}
    for name, both in columns.items():
        sums, counts = np.einsum("dr,asnr->ndas", rows[both.shape[-1]], both)
        means = sums / np.maximum(counts, 1)
        if name == "cross_entropy":
            name, means = "perplexity", np.exp(np.minimum(means, 700.0))
        by_seed = means[:, 0] - means[:, 1]  # [1 + draws, S]
        mean, *drawn = by_seed.mean(1)
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        spread = _spread(by_seed[0])
        below, above = np.hypot(mean - low, spread), np.hypot(high - mean, spread)
        found[name] = Difference(float(mean), float(mean - below), float(mean + above))
    return found


def paired_columns(
    ours: Sequence[Measured], theirs: Sequence[Measured]
) -> dict[str, NDArray[np.float64]]:
    """The columns of each figure that both methods have, side by side.

    Args:
        ours: S measurements, one for each seed, of the same R rows.
        theirs: The other method's S measurements, in the same order of seeds.

    Returns:
        Figure -> [2, S, 2, R]: of each method and seed the sum of each row, and its divisor.

    Raises:
        ValueError: The measurements have different rows or seeds.
    """
    columns = [[each.columns() for each in side] for side in (ours, theirs)]
    names = sorted(columns[0][0].keys() & columns[1][0].keys())
    sizes = {name: len(columns[0][0][name][0]) for name in names}
    other = [n for n in names for side in columns for c in side if len(c[n][0]) != sizes[n]]
    lengths = {tuple(each.lengths) for each in (*ours, *theirs)}
    if len(ours) != len(theirs) or len(lengths) > 1 or other:
        raise ValueError("measurements of different rows or seeds cannot be paired")
    return {name: np.array([[c[name] for c in side] for side in columns], float) for name in names}


def _spread(by_seed: NDArray[np.float64]) -> float:
    """Half the t interval of a mean over seeds; 0 for one seed."""
    seeds = len(by_seed)
    if seeds == 1:
        return 0.0
    return float(stdtrit(seeds - 1, (1 + LEVEL) / 2) * by_seed.std(ddof=1) / seeds**0.5)


def _counts(generator: np.random.Generator, draws: int, size: int) -> NDArray[np.int64]:
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)
