"""A benchmark as a table, and as a page that opens from disk."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from kdcore_cli.tables import table


def show_bench(console: Console, outcome: Mapping[str, Any]) -> None:
    """A table for each temperature and batch size."""
    for (temperature, size), rows in _groups(outcome):
        console.print(f"temperature {temperature:g}, batch {size}", style="bold")
        against = list(rows[0]["speedup"])
        first = against[0]
        shown = table("method", "tokens/s", f"x {first} [95 %]", "x plain", "tau", "same")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in rows:
            ratio, plain = row["speedup"][first], row["speedup"]["plain"]
            shown.add_row(
                row["method"],
                f"{row['tokens_per_second']:.1f}",
                f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                f"{plain['mean']:.2f}",
                "" if row["tau"] is None else f"{row['tau']:.2f}",
                "" if row["identical"] is None else f"{row['identical']:.0%}",
            )
        console.print(shown)
    console.print(
        "ratios of tokens per second on the same prompts: the median of each set, meaned; same: "
        "answers equal to the plain loop's",
        style="dim",
    )


def page(outcome: Mapping[str, Any]) -> str:
    """A self-contained HTML page: the speed-up of every method on every task set."""
    import plotly.graph_objects as go  # heavy

    figures: list[str] = []
    for (temperature, size), rows in _groups(outcome):
        first = next(iter(rows[0]["speedup"]))
        figure = go.Figure(
            [
                go.Bar(
                    name=row["method"],
                    x=[*row["speedup"][first]["sets"], "mean"],
                    y=[*row["speedup"][first]["sets"].values(), row["speedup"][first]["mean"]],
                )
                for row in rows
            ]
        )
        title = f"times {first}: temperature {temperature:g}, batch {size}"
        figure.update_layout(title=title, template="plotly_white", barmode="group")
        figures.append(figure.to_html(full_html=False, include_plotlyjs=not figures))
    title = html.escape(f"Decoding speed of {outcome['target']}")
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title></head>"
        f"<body style='font-family:sans-serif;max-width:70rem;margin:auto'><h1>{title}</h1>"
        + "".join(figures)
        + "</body></html>"
    )


def _groups(outcome: Mapping[str, Any]) -> list[tuple[tuple[float, int], list[dict[str, Any]]]]:
    groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in outcome["rows"]:
        groups.setdefault((row["temperature"], row["batch_size"]), []).append(row)
    return list(groups.items())
