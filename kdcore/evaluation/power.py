"""The difference that a comparison can see, simulated before it is run.

A pilot says how much the difference of two methods varies over held-out rows and over seeds. Of
many simulated studies of a planned size, that share has to find a difference whose interval
(`kdcore.evaluation.bootstrap.paired_differences`) excludes 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import LEVEL, paired_columns
from kdcore.runs.results import Measured


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the difference of two methods varies.

    Attributes:
        rows: Standard deviation of a row's difference, in the figure's unit. For right and wrong
            answers it is about the square root of the share of answers on which the two differ.
        seeds: Standard deviation of the whole difference over seeds.
    """

    rows: float
    seeds: float


def spreads(ours: Sequence[Measured], theirs: Sequence[Measured]) -> dict[str, Spread]:
    """Measure the spread of each figure in a pilot.

    A row's difference is linearised: with sums s, counts n and their total ratio m, it is
    ((s - m n) of ours - the same of theirs) / mean of n.

    Args:
        ours: S measurements, one for each seed, of the same R rows.
        theirs: The other method's, in the same order of seeds.

    Returns:
        Figure -> spread; ``seeds`` is 0 with one seed. Perplexity is told by ``cross_entropy``.

    Raises:
        ValueError: The measurements have different rows or seeds.
    """
    found = {}
    for name, both in paired_columns(ours, theirs).items():
        sums, counts = both[:, :, 0], both[:, :, 1]  # [2, S, R] each
        whole = np.maximum(counts.sum(-1, keepdims=True), 1)
        ratio = sums.sum(-1, keepdims=True) / whole
        linear = (sums - ratio * counts) * (counts.shape[-1] / whole)
        by_row, by_seed = (linear[0] - linear[1]).mean(0), (ratio[0] - ratio[1])[:, 0]
        over_seeds = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0
        found[name] = Spread(float(by_row.std(ddof=1)) if len(by_row) > 1 else 0.0, over_seeds)
    return found


def detectable_difference(
    spread: Spread,
    *,
    rows: int,
    seeds: int,
    power: float = 0.8,
    draws: int = 20_000,
    seed: int = 0,
) -> float:
    """Simulate the smallest true difference that a study of this size probably sees.

    In study i the seeds' differences are g_s ~ N(0, spread.seeds^2), the rows add
    b ~ N(0, spread.rows^2 / R), and the interval of the mean is m +- h with m = mean(g) + b and
    h = hypot(z spread.rows / sqrt(R), t(S - 1) sd(g) / sqrt(S)). A true difference d is seen if
    d + m - h > 0, so the answer is the quantile ``power`` of h - m.

    Args:
        spread: The spread of the figure, e.g. of a pilot.
        rows: R, the number of held-out rows (or answers).
        seeds: S, the number of seeds; with one, the intervals leave out their variation.
        power: Share of studies that see the difference.
        draws: Number of simulated studies.
        seed: Seed of the simulation.

    Returns:
        The difference in the figure's unit.

    Raises:
        UserError: No rows or seeds, or a power outside (0, 1).
    """
    if rows < 1 or seeds < 1 or not 0 < power < 1:
        raise UserError(
            f"a study of {rows} rows and {seeds} seeds with power {power:g} cannot be simulated",
            "give at least one row and one seed, and a power between 0 and 1",
        )
    generator, tail = np.random.default_rng(seed), (1 + LEVEL) / 2
    by_seed = generator.normal(0.0, spread.seeds, (draws, seeds))
    of_rows = spread.rows / rows**0.5
    mean = by_seed.mean(1) + generator.normal(0.0, of_rows, draws)
    over_seeds = np.zeros(draws)
    if seeds > 1:
        over_seeds = stdtrit(seeds - 1, tail) * by_seed.std(1, ddof=1) / seeds**0.5
    half = np.hypot(ndtri(tail) * of_rows, over_seeds)
    return float(np.quantile(half - mean, power))
