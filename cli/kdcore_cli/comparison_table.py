"""A comparison as a table."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from kdcore.evaluation.bootstrap import Difference
from kdcore.evaluation.heldout import Metric
from kdcore.reporting.comparison_notes import notes
from kdcore.reporting.run_record import Comparison
from kdcore.step_costs import in_bytes, in_seconds
from kdcore_cli.tables import table


def show_comparison(console: Console, outcome: Comparison, metric: str) -> None:
    """One figure of every arm, its difference from the baseline, and what the arm cost."""
    (shown,) = (each for each in outcome.metrics if each.name == metric)
    baseline = outcome.baseline
    rows = table("arm", shown.title, f"minus {baseline} [95 %]", "seconds", "tokens", "memory")
    for column in rows.columns[1:]:
        column.justify = "right"
    for arm in outcome.arms:
        if not arm.figures:
            rows.add_row(arm.arm, "failed")
            continue
        figure = arm.figures.get(metric)
        gap = None if arm.arm == baseline else arm.differences.get(metric)
        rows.add_row(
            arm.arm,
            "-" if figure is None else format(figure, shown.format),
            _difference(gap, shown) if gap else "",
            in_seconds(arm.cost["seconds"]),
            f"{arm.cost['tokens']:,.0f}",
            in_bytes(arm.cost["peak_memory"]),
        )
    console.print(rows)
    seeds = ", ".join(map(str, outcome.seeds))
    console.print(
        f"means over seeds {seeds}; green and red where the interval leaves 0 out",
        style="dim",
    )
    for note in notes(outcome):
        console.print(Text(note, "dim"))
    for cell, reason in outcome.failures.items():
        console.print(Text(f"failed: {cell}: {reason}", "red"))


def _difference(gap: Difference, metric: Metric) -> Text:
    """Green where the arm is surely better than the baseline, red where surely worse."""
    form = metric.format
    style = ""
    if gap.distinguishable:
        style = "green" if (gap.mean < 0) == (metric.better == "lower") else "red"
    return Text(f"{gap.mean:+{form}} [{gap.low:+{form}}, {gap.high:+{form}}]", style)
