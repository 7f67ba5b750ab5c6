"""Tables of the command line, and the results of a run as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from kdcore.jobs.evaluate import Evaluation
    from kdcore.runs.results import Metric, TrainingResults

SIDE_BY_SIDE = 100
"""Minimum console width that shows sample answers side by side."""


def table(*columns: str, **options: Any) -> Table:
    """Create an empty table in the style of the command line.

    Args:
        *columns: Headings.
        **options: Options of ``rich.table.Table``.

    Returns:
        The table, to add rows to.
    """
    empty = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **options)
    for name in columns:
        empty.add_column(name, overflow="fold")
    return empty


def keep_together(column: Column) -> None:
    """Let the cells of a column of a table be one line each; a narrow console prints lines.

    Args:
        column: The column, which has all its cells; its heading may break.
    """
    column.min_width = max((Text(str(cell)).cell_len for cell in column.cells), default=0)


def show_facts(console: Console, found: Any) -> None:
    """Print a record or a mapping, one field per row; values other than strings as JSON.

    Args:
        console: Console to print to.
        found: Dataclass or mapping.
    """
    facts = dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found  # type: ignore[arg-type]
    rows = table("", "", show_header=False)
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        rows.add_row(Text(str(name), "bold"), text)
    console.print(rows)


def show_results(console: Console, results: TrainingResults) -> None:
    """Print the metrics of a run, before and after training, and its sample answers.

    Args:
        console: Console to print to.
        results: Results of the run.
    """
    measured = {"before": results.before, "after": results.after}
    sides = {side: figures for side, figures in measured.items() if figures}
    if sides:
        shown = table("held-out", *sides)
        for column in shown.columns[1:]:
            column.justify = "right"
        for metric in results.metrics:
            figures = [each.get(metric.name) for each in sides.values()]
            shown.add_row(metric.title, *_figures(metric, figures))
        console.print(shown)
    else:
        console.print("no metrics: the spec does not set data.heldout")
    for sample in results.samples:
        _show_sample(console, sample)


def show_evaluation(console: Console, outcome: Evaluation) -> None:
    """Print the metrics of a model, its lm-eval results and its sample answers.

    Args:
        console: Console to print to.
        outcome: Results of the evaluation.
    """
    shown = table("held-out" if outcome.metrics else "", _from_here(outcome.model["name"]))
    shown.columns[1].justify = "right"
    for metric in outcome.metrics:
        shown.add_row(metric.title, format(outcome.figures[metric.name], metric.format))
    for task, figures in outcome.lm_eval.items():
        for name, value in figures.items():
            shown.add_row(f"{task} {name}", f"{value:.4f}")
    console.print(shown)
    for sample in outcome.samples:
        _show_sample(console, sample)


def _from_here(name: str) -> str:
    """Return a model's name; a folder below the working directory as a relative path."""
    folder, here = Path(name), Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else name


def _figures(metric: Metric, figures: Sequence[float | None]) -> Iterator[Text]:
    """Format values in the order of time; green if better than the one before, red if worse."""
    for old, new in zip([None, *figures], figures, strict=False):
        style = ""
        if old is not None and new is not None and old != new:
            style = "green" if (new < old) == (metric.better == "lower") else "red"
        yield Text("-" if new is None else format(new, metric.format), style)


def _show_sample(console: Console, sample: Mapping[str, str]) -> None:
    """Print a prompt and the answers of each model, side by side if the console is wide."""
    who = [name for name in sample if name != "prompt"]
    console.print(Rule(_one_line(sample["prompt"]), align="left", style="dim"))
    if console.width >= SIDE_BY_SIDE:
        answers = table(*who, expand=True)
        for column in answers.columns:
            column.ratio = 1
        answers.add_row(*(sample[name] for name in who))
        console.print(answers)
    else:
        for name in who:
            console.print(Text(name, "bold"))
            console.print(Padding(sample[name], (0, 0, 0, 2)))


def _one_line(text: str) -> str:
    return " ".join(text.split())
