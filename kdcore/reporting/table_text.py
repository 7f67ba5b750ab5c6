"""Tables as text for other programs: CSV with plain numbers, LaTeX and Markdown for papers.

CSV has one line for each figure, with full precision. LaTeX and Markdown show the tables of the
report page, with the format of each metric.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from kdcore.errors import UserError, nearest
from kdcore.reporting.compared_runs import compared
from kdcore.reporting.report_tables import (
    Cell,
    Table,
    bench_table,
    comparison_table,
    controls_table,
    held_out_table,
    notes,
    seeds_of,
    turns_table,
)
from kdcore.reporting.run_record import RunRecord, read_runs
from kdcore.runs.comparison_results import BenchResults, Comparison
from kdcore.runs.results import Difference

TableFormat: TypeAlias = Literal["csv", "latex", "markdown"]
"""A text format of tables."""


_BELOW = "below a figure is its difference from the baseline's, with a 95 % interval"


@dataclass(frozen=True)
class Tables:
    """The tables of an outcome.

    Attributes:
        shown: The tables as people read them.
        headings: The columns of the CSV.
        lines: The lines of the CSV.
        notes: What must be said beside the tables.
    """

    shown: Sequence[Table]
    headings: Sequence[str]
    lines: Sequence[Sequence[object]]
    notes: Sequence[str] = ()


def tables_of_runs(folders: Sequence[Path], metrics: Sequence[str] = ()) -> Tables:
    """Collect the tables of one run, or of a comparison of several finished ones.

    Args:
        folders: The run folders; of several, the first run is the baseline.
        metrics: The figures of a comparison to show, in this order (default: all).

    Returns:
        The tables.

    Raises:
        UserError: A folder is not a run folder, a run has no results, `compared` refuses the runs,
            or a metric was not measured or chosen of a run that is no comparison.
    """
    runs = read_runs(folders)
    first = runs[0]
    if len(runs) == 1 and not (first.comparison or first.bench or first.results):
        raise UserError(
            f"the run {first.name} has no results; its status is '{first.status}'",
            "name a run of a job that measures"
            if first.status == "done"
            else "finish the run with resume=True",
        )
    outcome = compared(runs) if len(runs) > 1 else first.comparison or first.bench or first
    if not metrics:
        return tables_of(outcome)
    if not isinstance(outcome, Comparison):
        raise UserError(
            f"a metric is chosen of a comparison, and the run {first.name} is none",
            "choose none, or name a second run",
        )
    return tables_of(_only(outcome, metrics))


def _only(comparison: Comparison, metrics: Sequence[str]) -> Comparison:
    measured = {metric.name: metric for metric in comparison.metrics}
    for name in metrics:
        if name not in measured:
            raise UserError(f"unknown metric '{name}'", nearest(name, measured))
    return replace(comparison, metrics=[measured[name] for name in metrics])


def tables_of(outcome: Comparison | BenchResults | RunRecord) -> Tables:
    """Collect the tables of a comparison, a benchmark or a training run."""
    if isinstance(outcome, Comparison):
        controls = controls_table(outcome)
        shown = [comparison_table(outcome), *([controls] if controls else [])]
        headings = ["arm", "figure", "mean", "seeds", "minus", "difference", "low", "high"]
        said = [seeds_of(outcome)]
        if len(outcome.arms) > 1:
            said += [f"{outcome.baseline} is the baseline; {_BELOW}"]
        return Tables(shown, headings, [*_compared(outcome)], [*said, *notes(outcome)])
    if isinstance(outcome, BenchResults):
        headings = ["method", "temperature", "batch_size", "threads", "turn", "tokens_per_second"]
        headings += [
            "cpu_ms",
            "tau",
            "identical",
            "agreed",
            "over",
            "clock",
            "speedup",
            "low",
            "high",
        ]
        turns = turns_table(outcome.rows)
        shown = [bench_table(outcome.rows), *([turns] if turns else [])]
        return Tables(shown, headings, [*_benched(outcome)])
    table = held_out_table([outcome])
    headings = ["figure", "before", "after", "difference", "low", "high"]
    return Tables([table] if table else [], headings, [*_trained(outcome)])


def as_text(tables: Tables, form: TableFormat) -> str:
    """Write tables as text.

    Args:
        tables: The tables.
        form: The format.

    Returns:
        The text, ending in a newline.

    Raises:
        UserError: The format is unknown.
    """
    if form not in _WRITERS:
        raise UserError(f"unknown table format '{form}'", nearest(form, _WRITERS))
    return _WRITERS[form](tables)


def _compared(comparison: Comparison) -> Iterator[Sequence[object]]:
    for arm in comparison.arms:
        for metric in comparison.metrics:
            value, seeds = arm.figures.get(metric.name), " ".join(map(str, arm.seeds))
            against: dict[str, Difference | None] = {
                f"{arm.arm}+{control}": gaps.get(metric.name)
                for control, gaps in arm.controls.items()
            }
            if arm.arm != comparison.baseline:
                against = {comparison.baseline: arm.differences.get(metric.name)} | against
            for other, gap in (against or {"": None}).items():
                yield arm.arm, metric.name, value, seeds, other, *_numbers(gap)


def _benched(outcome: BenchResults) -> Iterator[Sequence[object]]:
    for row in outcome.rows:
        setting = (row.method, row.temperature, row.batch_size, row.threads)
        whole = (None, row.tokens_per_second, row.cpu_ms, row.tau, row.identical, row.agreed)
        for clock, speedups in (("wall", row.speedup), ("cpu", row.cpu_speedup)):
            for other, speedup in speedups.items():
                gain = speedup.mean, speedup.low, speedup.high
                yield *setting, *whole, other, clock, *gain
        for each in row.turns:
            part = (each.turn, each.tokens_per_second, None, each.tau, None, None)
            for other, speedup in each.speedup.items():
                yield *setting, *part, other, "wall", speedup.mean, speedup.low, speedup.high


def _trained(run: RunRecord) -> Iterator[Sequence[object]]:
    results = run.results
    for metric in results.metrics if results else ():
        assert results is not None
        before, after = results.before.get(metric.name), results.after.get(metric.name)
        yield metric.name, before, after, *_numbers(run.changes.get(metric.name))


def _numbers(gap: Difference | None) -> tuple[float | None, float | None, float | None]:
    return (gap.mean, gap.low, gap.high) if gap else (None, None, None)


def _csv(tables: Tables) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(tables.headings)
    writer.writerows(tables.lines)
    return text.getvalue()


def _markdown(tables: Tables) -> str:
    blocks = []
    for table in tables.shown:
        rows = [[*map(_plain, table.headings)], ["---"] + ["---:"] * (len(table.headings) - 1)]
        rows += [["<br>".join(map(_plain, _parts(cell))) for cell in row] for row in table.rows]
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*blocks, *map(_plain, tables.notes)]) + "\n"


def _latex(tables: Tables) -> str:
    """LaTeX for the package booktabs."""
    blocks = []
    for table in tables.shown:
        columns = "l" + "r" * (len(table.headings) - 1)
        texts = [text for row in table.rows for text in _lines(row)]
        body = [" & ".join(map(_escaped, line)) for line in texts]
        lines = [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_escaped, table.headings)) + r" \\",
            r"\midrule",
            # LaTeX reads a bracket or a star after a line's end as an argument of the end
            *(f"{'{}' if row.startswith(('[', '*')) else ''}{row} \\\\" for row in body),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *(f"% {_one_line(note)}" for note in tables.notes)]) + "\n"


def _parts(cell: Cell) -> list[str]:
    return [text for text in (cell.text, cell.below) if text]


def _lines(row: Sequence[Cell]) -> list[list[str]]:
    """The lines of a row: what stands below its figures has a line of its own."""
    lines = [[cell.text for cell in row], [cell.below for cell in row]]
    return lines if any(lines[1]) else lines[:1]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, and that stays in its cell."""
    return html.escape(_one_line(text), quote=False).replace("|", "\\|")


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "×": r"$\times$",
        "\N{MINUS SIGN}": "$-$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def _escaped(text: str) -> str:
    signed = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", _one_line(text))
    return signed.translate(_LATEX)


def _one_line(text: str) -> str:
    return " ".join(text.split())


_WRITERS: dict[TableFormat, Callable[[Tables], str]] = {
    "csv": _csv,
    "latex": _latex,
    "markdown": _markdown,
}
