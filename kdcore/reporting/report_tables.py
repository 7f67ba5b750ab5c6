"""The figures of runs as tables: what they were, cost and reached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from kdcore.reporting.run_record import RunRecord
from kdcore.runs.comparison_results import Arm, BenchRow, ChosenBy, Comparison
from kdcore.runs.costs import in_bytes, in_seconds, spent
from kdcore.runs.results import Cost, Difference, Metric

NONE = "-"
"""Stands for a figure that there is not."""


@dataclass(frozen=True)
class Cell:
    """A text; style: better, worse, or nothing. below: a smaller line under it."""

    text: str
    style: str = ""
    below: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of one length. The first column names the row."""

    headings: list[str]
    rows: list[list[Cell]]


def overview(runs: Sequence[RunRecord]) -> Table:
    """What each run was, how it ended and what it cost."""
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
    """To the minute, by the clock of the machine that ran it; what is no time as it is written."""
    try:
        return f"{datetime.fromisoformat(written):%Y-%m-%d %H:%M}"
    except ValueError:
        return written


def versions(runs: Sequence[RunRecord]) -> Table:
    """Of the packages, and of what the models were."""
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
    return _whole(["run", "what", "version"], _in_cells(rows))


def held_out_table(runs: Sequence[RunRecord]) -> Table | None:
    """Every figure of every run that measured any, when it did; None when none has."""
    known = [(run, run.results) for run in runs if run.results]
    metrics = {metric.name: metric for _, each in known for metric in each.metrics}
    for _, each in known:  # a run that has not ended does not say how its figures are shown
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
                    Cell("" if gap is None else _gap(gap, metric)),
                ]
            )
    headings = ["held-out", "run", "before", "after", "change [95 %]"]
    return _whole(headings, rows) if rows else None


SAME = "same: greedy answers that are the plain loop's, token by token"
"""A column of `bench_table` in words."""


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """A row for each method, temperature and batch size; a column for each that it is beside."""
    against = list(dict.fromkeys(other for row in rows for other in row.speedup))
    cells = []
    for row in rows:
        shown = [
            row.method,
            f"{row.temperature:g}",
            str(row.batch_size),
            f"{row.tokens_per_second:.1f}",
            *(_speedup(row, other) for other in against),
            "" if row.predicted is None else f"{row.predicted:.2f}",
            "" if row.tau is None else f"{row.tau:.2f}",
            "" if row.identical is None else f"{row.identical:.0%}",
            "" if row.draft_ms is None else f"{row.draft_ms:.1f}",
            "" if row.verify_ms is None else f"{row.verify_ms:.1f}",
            " ".join(f"{rate:.0%}" for rate in row.acceptance),
        ]
        cells.append(shown)
    speeds = [speedup_over(other) for other in against]
    headings = ["method", "temperature", "batch", "tokens/s", *speeds, "× plain, predicted"]
    headings += ["tau", "same", "drafting (ms)", "verifying (ms)", "accepted at each level"]
    return _whole(headings, _in_cells(cells))


def speedup_over(other: str) -> str:
    """The heading of a column of `bench_table`."""
    return f"× {other} [95 %]"


def _speedup(row: BenchRow, other: str) -> str:
    """Nothing where the other method was not tried in this setting."""
    if other not in row.speedup:
        return ""
    if other == row.method:
        return "1"
    speedup = row.speedup[other]
    if speedup.low is None or speedup.high is None:
        return f"{speedup.mean:.2f}"
    return f"{speedup.mean:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]"


def comparison_table(comparison: Comparison) -> Table:
    """What every arm cost, and its figures with their differences from the baseline."""
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
    """What each gated arm has over each of its controls; None without any."""
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
    """Seconds, tokens and memory; nothing for what is not known."""
    cost = cost or Cost()
    return [
        in_seconds(cost.seconds) if cost.seconds else "",
        f"{cost.tokens:,.0f}" if cost.tokens else "",
        in_bytes(cost.peak_memory) if cost.peak_memory else "",
    ]


def as_written(value: float | None, metric: Metric) -> str:
    """A figure as its metric is written; a dash for none."""
    return NONE if value is None else format(value, form_of(metric))


def difference(gap: Difference, metric: Metric) -> Cell:
    """With its interval; better or worse where that leaves 0 out, as it is written."""
    style = ""
    borders = [float(format(each, form_of(metric)).rstrip("%")) for each in (gap.low, gap.high)]
    if gap.distinguishable and all(borders):  # else it is the rounding of equal weights, perhaps
        style = "better" if (gap.mean < 0) == (metric.better == "lower") else "worse"
    return Cell(_gap(gap, metric), style)


def _gap(gap: Difference, metric: Metric) -> str:
    form = form_of(metric)
    return f"{gap.mean:+{form}} [{gap.low:+{form}}, {gap.high:+{form}}]"


def form_of(metric: Metric) -> str:
    """As the run says, unless that could not be what kdcore wrote."""
    return metric.format if re.fullmatch(r"\.\d[fg%]", metric.format) else ".4g"


def _in_cells(rows: Iterable[Sequence[str]]) -> list[list[Cell]]:
    return [[Cell(text) for text in row] for row in rows]


def _whole(headings: list[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Without the columns that say nothing in any row."""
    kept = [n for n in range(len(headings)) if any(row[n].text not in ("", NONE) for row in rows)]
    return Table([headings[n] for n in kept], [[row[n] for n in kept] for row in rows])


def notes(comparison: Comparison) -> Iterator[str]:
    """Who lacks seeds, whom the rows flatter, by what a grid's points were chosen, and which."""
    for arm in comparison.arms:
        lacking = [str(seed) for seed in comparison.seeds if seed not in arm.seeds]
        if arm.figures and lacking:
            yield (
                f"{arm.arm} lacks seed {', '.join(lacking)}: its figures are of the others, and a "
                "difference is over the seeds that both have"
            )
    if comparison.kept_by_these_rows:
        arms = ", ".join(comparison.kept_by_these_rows)
        yield (
            f"kept at their best on these very rows (training.eval_every), which flatters "
            f"them: {arms}"
        )
    if comparison.chosen_by:
        yield _chosen_by(comparison.chosen_by)
    yield from (f"  {_chosen(arm)}" for arm in comparison.arms if arm.grid)


def _chosen_by(choice: ChosenBy) -> str:
    """By which figure, of which rows: not those of the table."""
    best = "lowest" if choice.metric.better == "lower" else "highest"
    seeds = ", ".join(map(str, choice.seeds))
    return (
        f"each arm at the point of the grid where its {choice.metric.title} was {best} on the "
        f"validation rows ({choice.rows.get('path', choice.rows['name'])}), "
        + (f"in the mean of seeds {seeds}:" if len(choice.seeds) > 1 else f"seed {seeds}:")
    )


def _chosen(arm: Arm) -> str:
    """What was chosen for an arm, and whether a better value may lie beyond its grid."""
    said = []
    for name, value in (arm.chosen or {}).items():
        tried = [point.fields[name] for point in arm.grid]
        ordered = all(type(each) in (int, float) for each in tried)  # what has edges
        at_edge = ordered and min(tried) < max(tried) and value in (min(tried), max(tried))
        said.append(f"{name} {value}" + (" (the edge of the grid)" if at_edge else ""))
    return f"{arm.arm}: {', '.join(said) or 'nothing to choose from'}"
