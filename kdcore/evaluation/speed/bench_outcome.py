"""The results of a benchmark from its measurements: speeds, speed-ups, acceptance, cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kdcore.runs.comparison_results import BenchResults, BenchRow, Speedup, TurnSpeed
from kdcore.specs.bench import PLAIN, BenchSpec

DRAWS = 2000
"""Number of resamples of the bootstrap over batches."""


class Cell(NamedTuple):
    """A batch that all methods decode.

    Attributes:
        threads: Number of threads of a CPU.
        temperature: Sampling temperature; 0 is greedy.
        batch_size: Prompts per batch.
        task_set: The task set.
        turn: The turn of the set's rows, from 1.
        batch: The batch's number within the turn.
    """

    threads: int
    temperature: float
    batch_size: int
    task_set: str
    turn: int
    batch: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of one batch of prompts, decoded by one method.

    Attributes:
        threads: Number of threads of a CPU.
        temperature: Sampling temperature; 0 is greedy.
        batch_size: Prompts per batch.
        task_set: The task set.
        turn: The turn of the set's rows, from 1.
        batch: The batch's number within the turn.
        method: The method.
        seconds: Seconds of the whole batch.
        tokens: Emitted tokens, including end tokens.
        cpu: Seconds of this process on the CPU, all threads together; None for a server.
        rounds: Verifications, as a server counts them for its answers (see
            `kdcore.evaluation.speed.served_decoder`); None for a method that does not count them.
        emitted: Tokens of these verifications; None as for ``rounds``, and in the files of versions
            that did not write it. A server's first token of an answer is not one of them, and a
            drafted end token has no bonus token after it.
        draft: Seconds of drafting; None for a server.
        verify: Seconds of verification; None for a server.
        accepted: Number of accepted nodes -> number of rounds.
        undrafted: Number of rounds without drafts; None as for ``rounds``.
        identical: Share of greedy answers that equal the plain loop's; None if sampled, or if a
            server does not return tokens.
        agreed: Mean share of the tokens of the plain loop's answer before the first that differs;
            None as for ``identical``.
    """

    threads: int
    temperature: float
    batch_size: int
    task_set: str
    turn: int
    batch: int
    method: str
    seconds: float
    tokens: int
    cpu: float | None = None
    rounds: int | None = None
    draft: float | None = None
    verify: float | None = None
    accepted: dict[int, int] | None = None
    identical: float | None = None
    agreed: float | None = None
    undrafted: int | None = None
    emitted: int | None = None

    @property
    def cell(self) -> Cell:
        """The batch."""
        setting = self.threads, self.temperature, self.batch_size
        return Cell(*setting, self.task_set, self.turn, self.batch)


def outcome(
    spec: BenchSpec,
    done: Sequence[Measurement],
    processor: str = "",
    multiplies: Sequence[str] = (),
) -> BenchResults:
    """Compute the results of every method with every setting.

    The speed-up over a baseline, the plain loop or the first of several servers is, for each set,
    the median over the batches of all its turns of the ratio of tokens per second; their mean has a
    95 % bootstrap interval over batches, unless every set has a single batch. The same ratio of
    tokens per second of CPU time tells more where other work keeps the machine busy.

    Args:
        spec: The bench spec.
        done: The measurements.
        processor: Name of the processor.
        multiplies: Its instructions for products of small numbers.

    Returns:
        One row for each method and setting.
    """
    rows: list[BenchRow] = []
    against = [*spec.baselines, PLAIN, *list(spec.servers)[: len(spec.servers) > 1]]
    for setting in dict.fromkeys(m.cell[:3] for m in done):
        of = [m for m in done if m.cell[:3] == setting]
        group = []
        for method in names(spec):
            own = [m for m in of if m.method == method]
            busy = [1000 * m.cpu / m.tokens for m in own if m.cpu]
            group.append(
                BenchRow(
                    method=method,
                    threads=own[0].threads,
                    temperature=own[0].temperature,
                    batch_size=own[0].batch_size,
                    tokens_per_second=_median(list(map(_wall, own))),
                    cpu_ms=_median(busy) if busy else None,
                    speedup={other: _speedup(own, of, other, _wall) for other in against},
                    cpu_speedup={
                        other: _speedup(own, of, other, _cpu)
                        for other in against
                        if all(m.cpu for m in of if m.method in (method, other))
                    },
                    identical=_mean([m.identical for m in own]),
                    agreed=_mean([m.agreed for m in own]),
                    turns=list(_turns(own, of, against)),
                    **_rounds(own),
                )
            )
        plain = next(row for row in group if row.method == PLAIN)
        rows += [replace(row, predicted=_predicted(row, plain)) for row in group]
    return BenchResults(
        target=spec.target.model,
        sets=list(spec.sets),
        processor=processor,
        multiplies=list(multiplies),
        rows=rows,
    )


def names(spec: BenchSpec) -> list[str]:
    """Return the names of all methods, in display order."""
    return [*spec.baselines, PLAIN, *spec.methods, *spec.servers]


def _turns(
    own: Sequence[Measurement], of: Sequence[Measurement], against: Sequence[str]
) -> Iterator[TurnSpeed]:
    """The figures of each turn, where there are several."""
    turns = sorted({m.turn for m in own})
    for turn in turns if len(turns) > 1 else ():
        part = [m for m in own if m.turn == turn]
        yield TurnSpeed(
            turn,
            _median(list(map(_wall, part))),
            _rounds(part)["tau"],
            {other: _speedup(part, of, other, _wall) for other in against},
        )


def _rounds(own: Sequence[Measurement]) -> dict[str, Any]:
    """tau, milliseconds per round, and the acceptance rate of each level where it was reached.

    Level 1 is reached by the rounds with drafts.
    """
    rounds = sum(m.rounds or 0 for m in own)
    if not rounds:
        return {"tau": None, "acceptance": []}
    accepted: dict[int, int] = {}
    for m in own:
        for count, times in (m.accepted or {}).items():
            accepted[count] = accepted.get(count, 0) + times
    emitted = sum(m.tokens if m.emitted is None else m.emitted for m in own)
    reached = [sum(n for c, n in accepted.items() if c >= k) for k in range(max(accepted) + 1)]
    undrafted = sum(m.undrafted or 0 for m in own)
    reached[0] -= undrafted
    figures: dict[str, Any] = {
        "tau": emitted / rounds,
        "acceptance": [b / a for a, b in pairwise(reached)],
        "undrafted": undrafted / rounds,
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


def _wall(measured: Measurement) -> float:
    return measured.tokens / measured.seconds


def _cpu(measured: Measurement) -> float:
    assert measured.cpu is not None
    return measured.tokens / measured.cpu


def _speedup(
    own: Sequence[Measurement],
    all_: Sequence[Measurement],
    other: str,
    speed: Callable[[Measurement], float],
) -> Speedup:
    theirs = {m.cell: speed(m) for m in all_ if m.method == other}
    ratios: dict[str, list[float]] = {}
    for m in own:
        ratios.setdefault(m.task_set, []).append(speed(m) / theirs[m.cell])
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


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
