"""The cost of a run's steps, computed from its log, and the format of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcore.runs.results import Cost


def spent(steps: Sequence[Mapping[str, float]]) -> Cost:
    """Sum the seconds inside steps and the tokens that each model read.

    Args:
        steps: The lines of the log; each holds means over the steps since the previous line.

    Returns:
        The cost, without peak memory.
    """
    total = {"seconds": 0.0, "tokens": 0.0}
    before = 0.0
    for line in steps:
        if total.keys() <= line.keys():
            for name in total:
                total[name] += line[name] * (line["step"] - before)
            before = line["step"]
    return Cost(**total)


def in_bytes(size: float) -> str:
    """Format a size in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def in_seconds(seconds: float) -> str:
    """Format a time in seconds, with one decimal below 10."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"
