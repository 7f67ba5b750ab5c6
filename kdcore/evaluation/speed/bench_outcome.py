"""The results of a benchmark from its measurements: speeds, speed-ups, acceptance, cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from kdcore.decoding.loop import Counter
from kdcore.runs.comparison_results import BenchResults, BenchRow, Speedup
from kdcore.specs.bench import PLAIN, BenchSpec

DRAWS = 2000
"""Number of resamples of the bootstrap over batches."""


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """The answers of one method to a batch of prompts.

    Attributes:
        tokens: Number of emitted tokens, including end tokens.
        answers: The tokens of each answer; None if a server does not return them.
        counter: Counts of rounds; None for a method that does not count them.
        seconds: Seconds of a server's answers; None if the time of the call is meant.
    """

    tokens: int
    answers: list[list[int]] | None
    counter: Counter | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of one batch of prompts, decoded by one method.

    Attributes:
        task_set: The task set.
        batch: The batch's number within the set.
        temperature: Sampling temperature; 0 is greedy.
        batch_size: Prompts per batch.
        method: The method.
        seconds: Seconds of the whole batch.
        tokens: Emitted tokens, including end tokens.
        rounds: Verifications, as a server counts them for its answers (see
            `kdcore.evaluation.speed.served_decoder`); None for a method that does not count them.
        draft: Seconds of drafting; None for a server.
        verify: Seconds of verification; None for a server.
        accepted: Number of accepted nodes -> number of rounds.
        identical: Share of greedy answers that equal the plain loop's; None if sampled, or if a
            server does not return tokens.
    """

    task_set: str
    batch: int
    temperature: float
    batch_size: int
    method: str
    seconds: float
    tokens: int
    rounds: int | None = None
    draft: float | None = None
    verify: float | None = None
    accepted: dict[int, int] | None = None
    identical: float | None = None

    @property
    def cell(self) -> tuple[float, int, str, int]:
        """The batch that all methods decoded: temperature, batch size, set and number."""
        return self.temperature, self.batch_size, self.task_set, self.batch


def outcome(spec: BenchSpec, done: Sequence[Measurement]) -> BenchResults:
    """Compute the results of every method at every temperature and batch size.

    The speed-up over a baseline, the plain loop or the first of several servers is, for each set,
    the median over its batches of the ratio of tokens per second; their mean has a 95 % bootstrap
    interval over batches, unless every set has a single batch.

    Args:
        spec: The bench spec.
        done: The measurements.

    Returns:
        One row for each method, temperature and batch size.
    """
    rows: list[BenchRow] = []
    for temperature, size in product(spec.temperatures, spec.batch_sizes):
        against = [*baselines(spec, size), PLAIN, *list(spec.servers)[: len(spec.servers) > 1]]
        of = [m for m in done if (m.temperature, m.batch_size) == (temperature, size)]
        group = []
        for method in names(spec, size):
            own = [m for m in of if m.method == method]
            known = [m.identical for m in own if m.identical is not None]
            group.append(
                BenchRow(
                    method=method,
                    temperature=temperature,
                    batch_size=size,
                    tokens_per_second=_median([m.tokens / m.seconds for m in own]),
                    speedup={other: _speedup(own, of, other) for other in against},
                    identical=sum(known) / len(known) if known else None,
                    **_rounds(own),
                )
            )
        plain = next(row for row in group if row.method == PLAIN)
        rows += [replace(row, predicted=_predicted(row, plain)) for row in group]
    return BenchResults(target=spec.target.model, sets=list(spec.sets), rows=rows)


def baselines(spec: BenchSpec, batch_size: int) -> list[str]:
    """Return the baselines of a batch size: assisted generation takes one prompt at a time."""
    return [name for name in spec.baselines if name == "generate" or batch_size == 1]


def names(spec: BenchSpec, batch_size: int) -> list[str]:
    """Return the names of all methods, in display order."""
    return [*baselines(spec, batch_size), PLAIN, *spec.methods, *spec.servers]


def _rounds(own: Sequence[Measurement]) -> dict[str, Any]:
    """tau, milliseconds per round, and the acceptance rate of each level where it was reached."""
    rounds = sum(m.rounds or 0 for m in own)
    if not rounds:
        return {"tau": None, "acceptance": []}
    accepted: dict[int, int] = {}
    for m in own:
        for count, times in (m.accepted or {}).items():
            accepted[count] = accepted.get(count, 0) + times
    emitted = sum((count + 1) * times for count, times in accepted.items())
    reached = [sum(n for c, n in accepted.items() if c >= k) for k in range(max(accepted) + 1)]
    figures: dict[str, Any] = {
        "tau": emitted / rounds,
        "acceptance": [b / a for a, b in pairwise(reached)],
    }
    for name in ("draft", "verify"):
        seconds = [each for each in (getattr(m, name) for m in own) if each is not None]
        if seconds:
            figures[f"{name}_ms"] = 1000 * sum(seconds) * own[0].batch_size / rounds
    return figures


def _predicted(row: BenchRow, plain: BenchRow) -> float | None:
    """The cost model's speed-up over the plain loop: tau * plain round / (draft + verify).

    It ignores the prompt's pass, and that rows of a batch end at different rounds.
    """
    if row.tau is None or row.verify_ms is None or plain.tau is None:
        return None
    own, one = ((each.draft_ms or 0) + (each.verify_ms or 0) for each in (row, plain))
    return row.tau * one / (plain.tau * own)


def _speedup(own: Sequence[Measurement], all_: Sequence[Measurement], other: str) -> Speedup:
    theirs = {m.cell: m.tokens / m.seconds for m in all_ if m.method == other}
    ratios: dict[str, list[float]] = {}
    for m in own:
        ratios.setdefault(m.task_set, []).append(m.tokens / m.seconds / theirs[m.cell])
    sets = {name: _median(each) for name, each in ratios.items()}
    low, high = _interval(list(ratios.values()))
    return Speedup(sets, float(np.mean(list(sets.values()))), low, high)


def _interval(sets: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """The interval of the mean of the medians; None if every set has a single batch."""
    if all(len(batches) == 1 for batches in sets):
        return None, None
    generator = np.random.default_rng(0)
    drawn = [generator.choice(each, (DRAWS, len(each))) for each in sets]
    means = np.mean([np.median(each, axis=1) for each in drawn], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
