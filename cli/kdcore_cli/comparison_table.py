"""A comparison as a table, and as a page that opens from disk."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from kdcore_cli.tables import in_bytes, table


def show_comparison(console: Console, outcome: Mapping[str, Any], metric: str) -> None:
    """One figure of every arm, its difference from the baseline, and what the arm cost."""
    (shown,) = (each for each in outcome["metrics"] if each["name"] == metric)
    baseline = outcome["baseline"]
    rows = table("arm", shown["title"], f"minus {baseline} [95 %]", "seconds", "tokens", "memory")
    for column in rows.columns[1:]:
        column.justify = "right"
    for arm in outcome["arms"]:
        if "figures" not in arm:
            rows.add_row(arm["arm"], "failed")
            continue
        cost, figure = arm["cost"], arm["figures"].get(metric)
        gap = None if arm["arm"] == baseline else arm.get("differences", {}).get(metric)
        rows.add_row(
            arm["arm"],
            "-" if figure is None else format(figure, shown["format"]),
            _difference(gap, shown) if gap else "",
            f"{cost['seconds']:.0f}",
            f"{cost['tokens']:,.0f}",
            in_bytes(cost["peak_memory"]),
        )
    console.print(rows)
    seeds = ", ".join(map(str, outcome["seeds"]))
    console.print(
        f"means over seeds {seeds}; green and red where the interval leaves 0 out",
        style="dim",
    )
    if outcome["kept_by_these_rows"]:
        arms = ", ".join(outcome["kept_by_these_rows"])
        console.print(
            Text(
                f"kept at their best on these very rows (training.eval_every), which flatters "
                f"them: {arms}",
                "dim",
            )
        )
    if "chosen_by" in outcome:
        console.print(Text(_chosen_by(outcome["chosen_by"]), "dim"))
    for arm in outcome["arms"]:
        if "chosen" in arm:
            console.print(Text(_chosen(arm), "dim"))
    for cell, reason in outcome["failures"].items():
        console.print(Text(f"failed: {cell}: {reason}", "red"))


def _chosen_by(choice: Mapping[str, Any]) -> str:
    """By which figure, of which rows: not those of the table."""
    metric, rows = choice["metric"], choice["rows"]
    return (
        f"each arm at the point of the grid where its {metric['title']} was "
        f"{'lowest' if metric['better'] == 'lower' else 'highest'} on the validation rows "
        f"({rows.get('path', rows['name'])}), seed {choice['seed']}:"
    )


def _chosen(arm: Mapping[str, Any]) -> str:
    """What was chosen for an arm, and whether a better value may lie beyond its grid."""
    said = []
    for name, value in (arm["chosen"] or {}).items():
        tried = [point["fields"][name] for point in arm["grid"]]
        ordered = all(type(each) in (int, float) for each in tried)  # what has edges
        at_edge = ordered and min(tried) < max(tried) and value in (min(tried), max(tried))
        said.append(f"{name} {value}" + (" (the edge of the grid)" if at_edge else ""))
    return f"  {arm['arm']}: {', '.join(said) or 'nothing to choose from'}"


def page(outcome: Mapping[str, Any]) -> str:
    """A self-contained HTML page with a table for every figure."""
    recorder = Console(record=True, width=110, file=io.StringIO(), highlight=False)
    for metric in outcome["metrics"]:
        recorder.rule(metric["title"], align="left")
        show_comparison(recorder, outcome, metric["name"])
    return recorder.export_html(inline_styles=True)


def _difference(gap: Mapping[str, float], metric: Mapping[str, str]) -> Text:
    """Green where the arm is surely better than the baseline, red where surely worse."""
    form = metric["format"]
    low, mean, high = gap["low"], gap["mean"], gap["high"]
    style = ""
    if low > 0 or high < 0:
        style = "green" if (mean < 0) == (metric["better"] == "lower") else "red"
    return Text(f"{mean:+{form}} [{low:+{form}}, {high:+{form}}]", style)
