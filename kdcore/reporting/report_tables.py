"""The tables of a report: overview, costs and figures of runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from kdcore.reporting.run_record import RunRecord
from kdcore.runs.comparison_results import Arm, BenchRow, ChosenBy, Comparison, Speedup
from kdcore.runs.costs import in_bytes, in_seconds, spent
from kdcore.runs.results import Cost, Difference, Metric
from kdcore.specs.bench import PLAIN

NONE = "-"
"""The text of a missing figure."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text.
        style: ``better``, ``worse`` or empty.
        below: A smaller line under the text.
    """

    text: str
    style: str = ""
    below: str = ""


@dataclass(frozen=True)
class Table:
    """A table with headings and rows of equal length; the first column names the row."""

    headings: list[str]
    rows: list[list[Cell]]


def overview(runs: Sequence[RunRecord]) -> Table:
    """Build the table of jobs, statuses and costs of runs."""
    rows = []
    for run in runs:
        last = max((int(line["step"]) for line in run.steps), default=None)
        rows.append(
            [
                run.name,
                run.job,
                run.status,
                "" if last is None else f"{last:,}",
                *costs(run.cost or spent(run.steps)),
                _moment(run.facts.started),
            ]
        )
    headings = ["run", "job", "status", "steps", "seconds in steps", "tokens read", "memory"]
    return _whole([*headings, "started"], _in_cells(rows))


def _moment(written: str) -> str:
    """Format a time to the minute, in its own time zone; other text is returned unchanged."""
    try:
        return f"{datetime.fromisoformat(written):%Y-%m-%d %H:%M}"
    except ValueError:
        return written


def versions(runs: Sequence[RunRecord]) -> Table:
    """Build the table of package versions and of the models' names and digests."""
    rows = []
    for run in runs:
        facts = run.facts
        rows += [[run.name, name, number] for name, number in facts.versions.items()]
        models = {
            "teacher": facts.teacher,
            "student": facts.student,
            "reference": facts.reference,
            "target": facts.target,
        }
        rows += [[run.name, who, f"{m.name} {m.digest}"] for who, m in models.items() if m]
    return _whole(["run", "name", "version"], _in_cells(rows))


def held_out_table(runs: Sequence[RunRecord]) -> Table | None:
    """Build the table of held-out figures of all runs; None if no run measured any."""
    known = [(run, run.results) for run in runs if run.results]
    metrics = {metric.name: metric for _, each in known for metric in each.metrics}
    for _, each in known:  # an unfinished run does not record how to show its figures
        for name in each.before if not each.metrics else ():
            metrics.setdefault(name, Metric(name, name, ".4g", "higher"))
    rows = []
    for metric in metrics.values():
        for run, each in known:
            before, after = each.before.get(metric.name), each.after.get(metric.name)
            if before is None and after is None:
                continue
            style = ""
            if before is not None and after is not None and before != after:
                style = "better" if (after < before) == (metric.better == "lower") else "worse"
            gap = run.changes.get(metric.name)
            rows.append(
                [
                    Cell(metric.title),
                    Cell(run.name if len(runs) > 1 else ""),
                    Cell(as_written(before, metric)),
                    Cell(as_written(after, metric), style),
                    Cell("" if gap is None else difference(gap, metric).text),
                ]
            )
    headings = ["held-out", "run", "before", "after", "change [95 %]"]
    return _whole(headings, rows) if rows else None


SAME = (
    "same: share of greedy answers that equal the plain loop's, token by token (in brackets: share "
    "of the tokens before the first that differs)"
)
"""The explanation of a column of `bench_table`."""
UNDRAFTED = "undrafted"
"""The heading of the share of rounds without drafts, of methods that draft."""
CPU_TIME = "CPU ms/token"
"""The heading of the CPU time of a token, which other work on the machine disturbs less."""


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Build the table of a benchmark, with columns of speed-ups over each other method."""
    against = list(dict.fromkeys(other for row in rows for other in row.speedup))
    busy = list(dict.fromkeys(other for row in rows for other in row.cpu_speedup))
    cells = []
    for row in rows:
        shown = [
            row.method,
            f"{row.temperature:g}",
            str(row.batch_size),
            "" if row.threads is None else str(row.threads),
            f"{row.tokens_per_second:.1f}",
            *(_speedup(row, row.speedup, other) for other in against),
            "" if row.cpu_ms is None else f"{row.cpu_ms:.1f}",
            *(_speedup(row, row.cpu_speedup, other) for other in busy),
            "" if row.predicted is None else f"{row.predicted:.2f}",
            "" if row.tau is None else f"{row.tau:.2f}",
            f"{row.undrafted:.0%}" if row.undrafted and row.method != PLAIN else "",
            _same(row),
            "" if row.draft_ms is None else f"{row.draft_ms:.1f}",
            "" if row.verify_ms is None else f"{row.verify_ms:.1f}",
            " ".join(f"{rate:.0%}" for rate in row.acceptance),
        ]
        cells.append(shown)
    headings = ["method", "temperature", "batch", "threads", "tokens/s"]
    headings += [*map(speedup_over, against), CPU_TIME]
    headings += [f"CPU {speedup_over(other)}" for other in busy]
    headings += ["× plain, predicted"]
    headings += ["tau", UNDRAFTED, "same", "drafting (ms)", "verifying (ms)"]
    headings += ["accepted at each level"]
    return _whole(headings, _in_cells(cells))


def turns_table(rows: Sequence[BenchRow]) -> Table | None:
    """Build the table of a benchmark's figures by turn; None if its rows have one turn."""
    against = list(dict.fromkeys(other for row in rows for other in row.speedup))
    cells = [
        [
            row.method,
            f"{row.temperature:g}",
            str(row.batch_size),
            "" if row.threads is None else str(row.threads),
            str(each.turn),
            f"{each.tokens_per_second:.1f}",
            *(_speedup(row, each.speedup, other) for other in against),
            "" if each.tau is None else f"{each.tau:.2f}",
        ]
        for row in rows
        for each in row.turns
    ]
    headings = ["method", "temperature", "batch", "threads", "turn", "tokens/s"]
    headings += [*map(speedup_over, against), "tau"]
    return _whole(headings, _in_cells(cells)) if cells else None


def _same(row: BenchRow) -> str:
    if row.identical is None:
        return ""
    if row.agreed is None or row.identical == 1:
        return f"{row.identical:.0%}"
    return f"{row.identical:.0%} ({row.agreed:.0%})"


def speedup_over(other: str) -> str:
    """Return the heading of the column of speed-ups over a method."""
    return f"× {other} [95 %]"


def _speedup(row: BenchRow, speedups: Mapping[str, Speedup], other: str) -> str:
    """Format a speed-up with its interval; empty without one over the other method."""
    if other not in speedups:
        return ""
    if other == row.method:
        return "1"
    speedup = speedups[other]
    if speedup.low is None or speedup.high is None:
        return f"{speedup.mean:.2f}"
    return f"{speedup.mean:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]"


def comparison_table(comparison: Comparison) -> Table:
    """Build the table of a comparison: cost, figures and differences from the baseline."""
    rows = []
    for arm in comparison.arms:
        cells = [Cell(arm.arm), *map(Cell, costs(arm.cost))]
        for metric in comparison.metrics:
            figure = arm.figures.get(metric.name)
            gap = None if arm.arm == comparison.baseline else arm.differences.get(metric.name)
            below = difference(gap, metric) if gap else Cell("")
            text = as_written(figure, metric) if arm.figures else "failed"
            cells.append(Cell(text, below.style, below.text))
        rows.append(cells)
    titles = [metric.title for metric in comparison.metrics]
    return Table(["arm", "seconds", "tokens", "memory", *titles], rows)


def controls_table(comparison: Comparison) -> Table | None:
    """Build the table of differences between gated arms and their controls; None without any."""
    rows = [
        [
            Cell(f"{arm.arm} minus {arm.arm}+{control}"),
            *(
                difference(gaps[m.name], m) if m.name in gaps else Cell("")
                for m in comparison.metrics
            ),
        ]
        for arm in comparison.arms
        for control, gaps in arm.controls.items()
    ]
    titles = [metric.title for metric in comparison.metrics]
    return Table(["gate and control", *titles], rows) if rows else None


def costs(cost: Cost | None) -> list[str]:
    """Format seconds, tokens and memory; unknown values are empty."""
    cost = cost or Cost()
    return [
        in_seconds(cost.seconds) if cost.seconds else "",
        f"{cost.tokens:,.0f}" if cost.tokens else "",
        in_bytes(cost.peak_memory) if cost.peak_memory else "",
    ]


def as_written(value: float | None, metric: Metric) -> str:
    """Format a figure by its metric; a dash for None."""
    return NONE if value is None else format(value, form_of(metric))


def difference(gap: Difference, metric: Metric) -> Cell:
    """Build the cell of a difference, styled if its interval excludes 0 even after rounding.

    A difference of percentages is in percentage points, pp.
    """
    style = ""
    scale, form, unit = form_of_difference(metric)
    mean, low, high = (scale * each for each in (gap.mean, gap.low, gap.high))
    borders = [float(format(each, form)) for each in (low, high)]
    if gap.distinguishable and all(borders):  # a bound that rounds to 0 may be rounding noise
        style = "better" if (gap.mean < 0) == (metric.better == "lower") else "worse"
    return Cell(f"{mean:+{form}} [{low:+{form}}, {high:+{form}}]{unit}", style)


def form_of_difference(metric: Metric) -> tuple[float, str, str]:
    """How the differences of a figure are written.

    A difference of percentages is not a percentage of one of them: it is in points.

    Returns:
        The factor, the format spec and the unit.
    """
    form = form_of(metric)
    return (100.0, f"{form[:-1]}f", " pp") if form.endswith("%") else (1.0, form, "")


def form_of(metric: Metric) -> str:
    """Return the run's format spec, or a default if kdcore would not have written it."""
    return metric.format if re.fullmatch(r"\.\d[fg%]", metric.format) else ".4g"


def _in_cells(rows: Iterable[Sequence[str]]) -> list[list[Cell]]:
    return [[Cell(text) for text in row] for row in rows]


def _whole(headings: list[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Build a table without the columns that are empty in all rows."""
    kept = [n for n in range(len(headings)) if any(row[n].text not in ("", NONE) for row in rows)]
    return Table([headings[n] for n in kept], [[row[n] for n in kept] for row in rows])


def seeds_of(comparison: Comparison) -> str:
    """The seeds over which the figures are means."""
    seeds = ", ".join(map(str, comparison.seeds))
    return f"means over seeds {seeds}" if len(comparison.seeds) > 1 else f"seed {seeds}"


def notes(comparison: Comparison) -> Iterator[str]:
    """Yield notes on few or missing seeds, optimistic figures, and the choice of grid points."""
    if all(len(arm.seeds) <= 1 for arm in comparison.arms):
        yield (
            "each arm has one seed: the intervals are over the held-out rows and do not include "
            "the variation of training"
        )
    for arm in comparison.arms:
        lacking = [str(seed) for seed in comparison.seeds if seed not in arm.seeds]
        if arm.figures and lacking:
            yield (
                f"{arm.arm} lacks seed {', '.join(lacking)}: its figures are means over its other "
                "seeds, and a difference is over the seeds that both arms have"
            )
    if comparison.kept_by_these_rows:
        arms = ", ".join(comparison.kept_by_these_rows)
        yield (
            f"chosen at their best on the reported rows (training.eval_every), which makes "
            f"their figures optimistic: {arms}"
        )
    if comparison.chosen_by:
        yield _chosen_by(comparison.chosen_by)
    yield from (f"  {_chosen(arm)}" for arm in comparison.arms if arm.grid or arm.lacks)


def _chosen_by(choice: ChosenBy) -> str:
    """The note on the figure, rows and seeds that chose the grid points."""
    best = "lowest" if choice.metric.better == "lower" else "highest"
    seeds = ", ".join(map(str, choice.seeds))
    return (
        f"each arm uses the grid point where its {choice.metric.title} was {best} on the "
        f"validation rows ({choice.rows.get('path', choice.rows['name'])}), "
        + (f"in the mean over seeds {seeds}:" if len(choice.seeds) > 1 else f"seed {seeds}:")
    )


def _chosen(arm: Arm) -> str:
    """The chosen values of an arm, marked at the edge of the grid, and the fields that it lacks."""
    said = []
    for name, value in (arm.chosen or {}).items():
        tried = [point.fields[name] for point in arm.grid]
        ordered = all(type(each) in (int, float) for each in tried)  # only numbers have edges
        at_edge = ordered and min(tried) < max(tried) and value in (min(tried), max(tried))
        said.append(f"{name} {value}" + (" (the edge of the grid)" if at_edge else ""))
    parts = [", ".join(said) or "every grid point failed"] if arm.grid else []
    if arm.lacks:
        parts.append(f"not tried over {', '.join(arm.lacks)}, which its spec lacks")
    return f"{arm.arm}: {'; '.join(parts)}"
