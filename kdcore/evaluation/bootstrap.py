"""Whether one model is really better than another: paired bootstrap over held-out rows.

Both models answered the same rows, so rows are drawn once for both: what makes a row hard for
either drops out of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcore.evaluation.heldout import Measured

LEVEL = 0.95
"""Coverage of the intervals."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, with the borders of its percentile interval of coverage `LEVEL`."""

    mean: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_differences(
    ours: Sequence[Measured], theirs: Sequence[Measured], draws: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """For each figure: ours minus theirs, in the mean over seeds.

    ours, theirs: S measurements each, one for each seed, in the same order, of the same R rows.
    Each draw takes S seeds and R rows (or answers) with replacement, the same for both sides. One
    seed gives an interval over rows only, which says nothing of how much training varies.

    Raises ValueError when the measurements are not of the same rows or seeds.
    """
    columns = [[each.columns() for each in side] for side in (ours, theirs)]
    names = sorted(columns[0][0].keys() & columns[1][0].keys())
    sizes = {name: len(columns[0][0][name][0]) for name in names}
    other = [n for n in names for side in columns for c in side if len(c[n][0]) != sizes[n]]
    lengths = {tuple(each.lengths) for each in (*ours, *theirs)}
    if len(ours) != len(theirs) or len(lengths) > 1 or other:
        raise ValueError("measurements of other rows or seeds cannot be paired")
    generator = np.random.default_rng(seed)
    # How often each draw takes each row, [1 + draws, R], and seed; the first is the data as it is.
    rows = {
        size: np.vstack([np.ones(size), _counts(generator, draws, size)])
        for size in dict.fromkeys([len(ours[0].lengths), *sizes.values()])
    }
    seeds = len(ours)
    seed_counts = np.vstack([np.ones(seeds), _counts(generator, draws, seeds)])
    found = {}
    for name in names:
        both = np.array([[c[name] for c in side] for side in columns])  # [sides, S, 2, R]
        sums, counts = np.einsum("dr,asnr->ndas", rows[sizes[name]], both)
        means = sums / np.maximum(counts, 1)
        if name == "cross_entropy":
            name, means = "perplexity", np.exp(np.minimum(means, 700.0))
        gap = ((means[:, 0] - means[:, 1]) * seed_counts).sum(1) / seeds
        low, high = np.quantile(gap[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = Difference(float(gap[0]), float(low), float(high))
    return found


def _counts(generator: np.random.Generator, draws: int, size: int) -> NDArray[np.int64]:
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)
