"""A benchmark as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from kdcore.reporting.report_tables import SAME, bench_table, speedup_over
from kdcore.runs.comparison_results import BenchResults, BenchRow
from kdcore_cli.tables import table


def show_bench(console: Console, outcome: BenchResults) -> None:
    """For each temperature and batch size the columns of the page that 80 characters have room for.

    They are in the page's words. Of the speed-ups, those over the first baseline and over the
    plain loop.
    """
    for (temperature, size), rows in _groups(outcome):
        console.print(f"temperature {temperature:g}, batch {size}", style="bold")
        over = [speedup_over(other) for other in (next(iter(rows[0].speedup)), "plain")]
        whole = bench_table(rows)
        wanted = ("method", "tokens/s", *over, "tau", "same")
        kept = [n for n, heading in enumerate(whole.headings) if heading in wanted]
        shown = table(*(whole.headings[n] for n in kept))
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in whole.rows:
            shown.add_row(*(row[n].text for n in kept))
        console.print(shown)
    console.print(
        "×: the ratio of tokens per second on the same prompts, the median of each set, meaned; "
        + SAME,
        style="dim",
    )


def _groups(outcome: BenchResults) -> Iterator[tuple[tuple[float, int], Sequence[BenchRow]]]:
    groups: dict[tuple[float, int], list[BenchRow]] = {}
    for row in outcome.rows:
        groups.setdefault((row.temperature, row.batch_size), []).append(row)
    yield from groups.items()
