"""A benchmark as a table."""

from __future__ import annotations

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


def _groups(outcome: Mapping[str, Any]) -> list[tuple[tuple[float, int], list[dict[str, Any]]]]:
    groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in outcome["rows"]:
        groups.setdefault((row["temperature"], row["batch_size"]), []).append(row)
    return list(groups.items())
