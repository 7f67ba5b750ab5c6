"""Table of the results of a comparison."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from kdcore.reporting.report_tables import Cell, as_written, costs, difference, notes, seeds_of
from kdcore.runs.comparison_results import Comparison
from kdcore_cli.terminal.console import with_options
from kdcore_cli.terminal.tables import keep_together, table

COLOURS = {"better": "green", "worse": "red", "": ""}
"""Colour in a terminal of each style of a report cell."""


def show_comparison(console: Console, outcome: Comparison, metric: str) -> None:
    """Print one metric of each arm, its differences from baseline and controls, and its cost.

    Args:
        console: Console to print to.
        outcome: Results of the comparison.
        metric: Name of the metric to show.
    """
    (asked,) = (each for each in outcome.metrics if each.name == metric)
    baseline = outcome.baseline
    rows = table("arm", asked.title, f"minus {baseline} [95 %]", "seconds", "tokens", "memory")
    for column in rows.columns[1:]:
        column.justify = "right"
    for arm in outcome.arms:
        if not arm.figures:
            rows.add_row(arm.arm, "failed")
            continue
        gap = None if arm.arm == baseline else arm.differences.get(metric)
        shown = difference(gap, asked) if gap else Cell("")
        rows.add_row(
            arm.arm,
            as_written(arm.figures.get(metric), asked),
            Text(shown.text, COLOURS[shown.style]),
            *costs(arm.cost),
        )
    keep_together(rows.columns[2])
    console.print(rows)
    if any(arm.controls for arm in outcome.arms):
        beside = table("gate", "minus its control", f"{asked.title} [95 %]")
        beside.columns[2].justify = "right"
        for arm in outcome.arms:
            for control, gaps in arm.controls.items():
                shown = difference(gaps[metric], asked) if metric in gaps else Cell("")
                beside.add_row(arm.arm, control, Text(shown.text, COLOURS[shown.style]))
        keep_together(beside.columns[2])
        console.print(beside)
    console.print(
        f"{seeds_of(outcome)}; a coloured difference has an interval without 0", style="dim"
    )
    for note in notes(outcome):
        console.print(note, style="dim")
    for cell, reason in outcome.failures.items():
        console.print(with_options(f"failed: {cell}: {reason}"), style="red")
