"""Plots of benchmarks, as bars, and of comparisons, as differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from kdcore.reporting.plot import COLOURS, Key, Plot, as_json, colour, text, told
from kdcore.reporting.report_tables import form_of
from kdcore.reporting.run_record import RunRecord
from kdcore.runs.comparison_results import BenchRow, Comparison

HEIGHT, ARM = 220, 24
"""Minimum height in pixels of a comparison's plot, and pixels per arm."""


def bench_plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Yield a plot for each setting: all methods of all runs, by task set."""
    settings = {row.setting: None for run in runs if run.bench for row in run.bench.rows}
    for setting in settings:
        figure = go.Figure()
        against: dict[str, None] = {}
        rows = list(_rows(runs, setting))
        template, layout = told(".2f", len(rows), "×")
        keys = [
            Key(f"method {place}", name, colour(place, len(rows)))
            for place, (name, _) in enumerate(rows)
        ]
        for key, (name, row) in zip(keys, rows, strict=True):
            other = next(iter(row.speedup))
            against[other] = None
            speedup = row.speedup[other]
            no_interval = [None] * len(speedup.sets)
            figure.add_bar(
                name=text(name),
                meta=[key.mark],
                marker={"color": key.colour},
                x=[text(each) for each in (*speedup.sets, "mean")],
                y=[*speedup.sets.values(), speedup.mean],
                error_y={
                    "type": "data",
                    "array": [*no_interval, _apart(speedup.mean, speedup.high)],
                    "arrayminus": [*no_interval, _apart(speedup.low, speedup.mean)],
                    "thickness": 1.5,
                    "color": "#888",  # visible on white and on black
                    "width": 0,  # no caps, because a set has no interval
                },
                hovertemplate=template,
            )
        figure.update_layout(layout, barmode="group", yaxis_title="speed-up")
        figure.update_xaxes(showgrid=False)
        title = f"Speed-up over {', '.join(against)} on each task set: {setting}"
        yield Plot(title, as_json(figure), keys=tuple(keys))


def _apart(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else high - low


def _rows(runs: Sequence[RunRecord], setting: str) -> Iterator[tuple[str, BenchRow]]:
    """Yield the rows of a setting with their labels: the method, after the run if several."""
    benches = [(run.name, run.bench) for run in runs if run.bench]
    for name, bench in benches:
        for row in bench.rows:
            if row.setting == setting and row.speedup:
                yield (f"{name}: {row.method}" if len(benches) > 1 else row.method), row


def comparison_plots(comparison: Comparison) -> Iterator[Plot]:
    """Yield a plot for each figure: the differences of all arms from the baseline."""
    for metric in comparison.metrics:
        arms = [
            (arm.arm, arm.differences[metric.name])
            for arm in comparison.arms
            if metric.name in arm.differences and arm.arm != comparison.baseline
        ]
        title = f"{metric.title}: difference from {comparison.baseline}"
        if not arms:
            yield Plot(title, None, "Only the baseline has results.")
            continue
        figure = go.Figure()
        form = form_of(metric)
        figure.add_scatter(
            x=[gap.mean for _, gap in arms],
            y=[text(arm) for arm, _ in arms],
            mode="markers",
            marker={"size": 9, "color": COLOURS[0]},
            error_x={
                "type": "data",
                "array": [gap.high - gap.mean for _, gap in arms],
                "arrayminus": [gap.mean - gap.low for _, gap in arms],
                "color": COLOURS[0],
            },
            customdata=[[gap.low, gap.high] for _, gap in arms],
            hovertemplate=f"%{{y}}: %{{x:+{form}}} "
            f"[%{{customdata[0]:+{form}}}, %{{customdata[1]:+{form}}}]<extra></extra>",
        )
        figure.add_vline(x=0, line={"width": 1, "dash": "dot", "color": "#888"})
        figure.update_layout(
            showlegend=False,
            xaxis_title=f"{metric.better} is better",
            yaxis={"autorange": "reversed", "automargin": True},
        )
        if form.endswith("%"):
            figure.update_xaxes(tickformat="~%")
        yield Plot(title, as_json(figure), height=max(HEIGHT, 70 + ARM * len(arms)))
