"""Table of benchmark results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from kdcore.reporting.report_tables import SAME, UNDRAFTED, bench_table, speedup_over
from kdcore.runs.comparison_results import BenchResults, BenchRow
from kdcore_cli.terminal.tables import table

WIDE = 1000
"""A width that holds any table in lines of its own."""


def show_bench(console: Console, outcome: BenchResults) -> None:
    """Print the processor, and one table for each setting, at most 80 characters wide.

    The table has some of the columns of the HTML page, under the same headings. Its speed-ups are
    those over the first baseline, over the plain loop and over the first of several servers.

    Args:
        console: Console to print to.
        outcome: Results of the benchmark.
    """
    if outcome.processor:
        console.print(f"{outcome.processor} ({', '.join(outcome.multiplies) or 'no extensions'})")
    paused = False
    for setting, rows in _groups(outcome):
        console.print(setting, style="bold")
        others = list(rows[0].speedup)
        later = others.index("plain") if "plain" in others else 1
        over = [speedup_over(other) for other in (others[0], *others[later:])]
        whole = bench_table(rows)
        wanted = ("method", "tokens/s", *over, "tau", UNDRAFTED, "same")
        kept = [
            n
            for n, heading in enumerate(whole.headings)
            if heading in wanted and (heading != UNDRAFTED or any(r[n].text for r in whole.rows))
        ]
        paused |= any(whole.headings[n] == UNDRAFTED for n in kept)
        texts = [[whole.headings[n], *(row[n].text for row in whole.rows)] for n in kept]
        shown = _columns(texts)
        if (
            console.measure(shown, options=console.options.update(width=WIDE)).maximum
            > console.width
        ):
            shown = _columns([[re.sub(r" (?=[\[(])", "\n", each) for each in t] for t in texts])
        console.print(shown)
    console.print(
        "×: ratio of tokens per second on the same prompts (mean over the sets of each set's "
        "median); " + ("undrafted: share of the rounds without drafts; " if paused else "") + SAME,
        style="dim",
    )


def _columns(texts: Sequence[Sequence[str]]) -> Table:
    """A table of columns, each with its heading."""
    shown = table(*(heading for heading, *_ in texts))
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in zip(*(each for _, *each in texts), strict=True):
        shown.add_row(*row)
    return shown


def _groups(outcome: BenchResults) -> Iterator[tuple[str, Sequence[BenchRow]]]:
    groups: dict[str, list[BenchRow]] = {}
    for row in outcome.rows:
        groups.setdefault(row.setting, []).append(row)
    yield from groups.items()
