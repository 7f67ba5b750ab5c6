"""Pearson's goodness of fit."""

from collections.abc import Mapping
from typing import Any

import torch


def p_value(counts: Mapping[Any, float], chances: Mapping[Any, float]) -> float:
    """The chance of a fit as bad as that of the counts, if outcomes have these chances.

    Outcomes expected less than ten times are pooled. One that cannot be must not have come.
    """
    assert abs(sum(chances.values()) - 1) < 1e-5
    if any(chances.get(outcome, 0.0) == 0.0 for outcome, count in counts.items() if count):
        return 0.0
    draws = sum(counts.values())
    cells: dict[Any, tuple[float, float]] = {}
    for outcome, chance in chances.items():
        if chance == 0:
            continue
        cell = outcome if chance * draws >= 10 else "pool"
        count, expected = cells.get(cell, (0.0, 0.0))
        cells[cell] = (count + counts.get(outcome, 0.0), expected + chance * draws)
    if len(cells) == 1:
        return 1.0  # there was nothing that could have come otherwise
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells.values())
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
