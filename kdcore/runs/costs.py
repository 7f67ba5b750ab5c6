"""What the steps of a run cost, from what was logged of them, and how a cost is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcore.runs.results import Cost


def spent(steps: Sequence[Mapping[str, float]]) -> Cost:
    """Seconds inside steps and the tokens that each model read, of all lines together.

    A line holds means over the steps since the line before.
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
    """A size as people read it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def in_seconds(seconds: float) -> str:
    """A time as people read it."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"
