"""Plots of decoding (speeds, acceptance) and of comparisons, as differences with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import plotly.graph_objects as go

from kdcore.reporting.plot import COLOURS, Key, Plot, as_json, colour, text, told
from kdcore.reporting.report_tables import form_of_difference
from kdcore.reporting.run_record import RunRecord
from kdcore.runs.comparison_results import BenchRow, Comparison
from kdcore.runs.results import Difference, Metric

HEIGHT, ARM = 220, 24
"""Minimum height in pixels of a comparison's plot, and pixels per arm."""
_GREY = "#888"
"""A colour that is visible on white and on black."""


def bench_plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Yield the plots of each setting, with all methods of all runs.

    They are the mean speed-ups, the speed-ups by task set, the speed-ups against tau, and the
    acceptance rates by level; the last two only with methods that draft.
    """
    settings = {row.setting: None for run in runs if run.bench for row in run.bench.rows}
    for setting in settings:
        rows = list(_rows(runs, setting))
        keys = [
            Key(f"method {place}", name, colour(place, len(rows)))
            for place, (name, _) in enumerate(rows)
        ]
        named = [(key, row) for key, (_, row) in zip(keys, rows, strict=True)]
        yield _means(named, setting)
        yield _speedups(named, setting)
        drafting = [(key, row) for key, row in named if row.tau is not None]
        if any(row.acceptance for _, row in drafting):
            yield _against_tau(drafting, setting)
            yield _by_level([(key, row) for key, row in drafting if row.acceptance], setting)


def _means(named: Sequence[tuple[Key, BenchRow]], setting: str) -> Plot:
    """A bar for each method, with its interval, the fastest first."""
    figure = go.Figure()
    means = [(key, other, row.speedup[other]) for key, row in named for other in [*row.speedup][:1]]
    for key, _, speedup in sorted(means, key=lambda mean: -mean[2].mean):
        figure.add_bar(
            orientation="h",
            name=text(key.name),
            meta=[key.mark],
            marker={"color": key.colour},
            x=[speedup.mean],
            y=[text(key.name)],
            error_x={
                "type": "data",
                "array": [_apart(speedup.mean, speedup.high)],
                "arrayminus": [_apart(speedup.low, speedup.mean)],
                "thickness": 1.5,
                "color": _GREY,
                "width": 0,
            },
            hovertemplate="%{y}: %{x:.2f}×<extra></extra>",
        )
    figure.update_layout(
        barmode="overlay",  # each method has a line of its own
        xaxis={"title": "speed-up", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False},
    )
    title = f"Mean speed-up over {', '.join(dict.fromkeys(other for _, other, _ in means))}: "
    return Plot(title + setting, as_json(figure), height=max(HEIGHT, 70 + ARM * len(means)))


def _speedups(named: Sequence[tuple[Key, BenchRow]], setting: str) -> Plot:
    """Bars of the speed-ups on each task set, and of their mean."""
    figure = go.Figure()
    against: dict[str, None] = {}
    template, layout = told(".2f", len(named), "×")
    for key, row in named:
        other = next(iter(row.speedup))
        against[other] = None
        speedup = row.speedup[other]
        no_interval = [None] * len(speedup.sets)
        figure.add_bar(
            name=text(key.name),
            meta=[key.mark],
            marker={"color": key.colour},
            x=[text(each) for each in (*speedup.sets, "mean")],
            y=[*speedup.sets.values(), speedup.mean],
            error_y={
                "type": "data",
                "array": [*no_interval, _apart(speedup.mean, speedup.high)],
                "arrayminus": [*no_interval, _apart(speedup.low, speedup.mean)],
                "thickness": 1.5,
                "color": _GREY,
                "width": 0,  # no caps, because a set has no interval
            },
            hovertemplate=template,
        )
    figure.update_layout(layout, barmode="group", yaxis_title="speed-up")
    figure.update_xaxes(showgrid=False)
    title = f"Speed-up over {', '.join(against)} on each task set: {setting}"
    return Plot(title, as_json(figure), keys=tuple(key for key, _ in named))


def _against_tau(named: Sequence[tuple[Key, BenchRow]], setting: str) -> Plot:
    """Points of tau and speed-up, beside the line on which a round costs as much as a token."""
    figure = go.Figure()
    most = max(row.tau or 1.0 for _, row in named)
    figure.add_scatter(
        x=[1, most], y=[1, most], mode="lines", line={"dash": "dot", "width": 1, "color": _GREY},
        hoverinfo="skip",
    )  # fmt: skip
    for key, row in named:
        speedup = row.speedup[next(iter(row.speedup))]
        figure.add_scatter(
            x=[row.tau],
            y=[speedup.mean],
            name=text(key.name),
            meta=[key.mark],
            mode="markers",
            marker={"size": 10, "color": key.colour},
            error_y={
                "type": "data",
                "array": [_apart(speedup.mean, speedup.high)],
                "arrayminus": [_apart(speedup.low, speedup.mean)],
                "color": key.colour,
            },
            hovertemplate="%{fullData.name}<br>tau %{x:.2f}: %{y:.2f}×<extra></extra>",
        )
    figure.update_layout(
        hovermode="closest", xaxis_title="tau (tokens per verification)", yaxis_title="speed-up"
    )
    note = "On the dotted line a round costs no more time than a token of the other method."
    keys = tuple(key for key, _ in named)
    return Plot(f"Speed-up against tau: {setting}", as_json(figure), note, keys)


def _by_level(named: Sequence[tuple[Key, BenchRow]], setting: str) -> Plot:
    """Lines of the acceptance rate of each level of the drafts, where it was reached."""
    figure = go.Figure()
    template, layout = told(".1%", len(named))
    for key, row in named:
        figure.add_scatter(
            x=list(range(1, len(row.acceptance) + 1)),
            y=row.acceptance,
            name=text(key.name),
            meta=[key.mark],
            mode="lines+markers",
            line={"color": key.colour, "width": 1.8},
            hovertemplate=template,
        )
    figure.update_layout(layout, xaxis={"title": "level of the draft", "dtick": 1})
    figure.update_yaxes(tickformat="~%", range=[0, 1.02])
    keys = tuple(key for key, _ in named)
    return Plot(f"Acceptance rate of each level: {setting}", as_json(figure), keys=keys)


def replay_plot(run: RunRecord) -> Plot | None:
    """Draw the tokens of each verification by their place in the response, for each method.

    Args:
        run: The run.

    Returns:
        The plot; None for a run without replays.
    """
    if not any(replay.rounds for replay in run.replays):
        return None
    figure = go.Figure()
    template, layout = told("d", len(run.replays))
    keys = []
    for place, replay in enumerate(run.replays):
        keys.append(Key(f"method {place}", replay.method, colour(place, len(run.replays))))
        emitted = [len(each.emitted) for each in replay.rounds]
        figure.add_scatter(
            x=list(accumulate(emitted, initial=0))[:-1],
            y=emitted,
            name=text(replay.method),
            meta=[keys[-1].mark],
            mode="lines+markers",
            line={"color": keys[-1].colour, "width": 1.8, "shape": "hv"},
            hovertemplate=template,
        )
    figure.update_layout(
        layout, xaxis_title="tokens of the response so far", yaxis={"rangemode": "tozero"}
    )
    return Plot("Tokens of each verification", as_json(figure), keys=tuple(keys))


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
    """Yield forest plots of each figure: differences from the baseline, then from the controls."""
    for metric in comparison.metrics:
        gaps = {
            arm.arm: arm.differences[metric.name]
            for arm in comparison.arms
            if metric.name in arm.differences and arm.arm != comparison.baseline
        }
        title = f"{metric.title}: difference from {comparison.baseline}"
        yield _forest(title, metric, gaps, "Only the baseline has results.")
        beside = {
            f"{arm.arm} minus {arm.arm}+{control}": gaps[metric.name]
            for arm in comparison.arms
            for control, gaps in arm.controls.items()
            if metric.name in gaps
        }
        if beside:
            yield _forest(f"{metric.title}: gates and their controls", metric, beside)


def _forest(title: str, metric: Metric, gaps: dict[str, Difference], missing: str = "") -> Plot:
    """A row for each difference, with its interval."""
    if not gaps:
        return Plot(title, None, missing)
    figure = go.Figure()
    scale, form, unit = form_of_difference(metric)
    mean, low, high = (
        [scale * getattr(gap, bound) for gap in gaps.values()] for bound in ("mean", "low", "high")
    )
    figure.add_scatter(
        x=mean,
        y=[text(name) for name in gaps],
        mode="markers",
        marker={"size": 9, "color": COLOURS[0]},
        error_x={
            "type": "data",
            "array": [b - a for a, b in zip(mean, high, strict=True)],
            "arrayminus": [a - b for a, b in zip(mean, low, strict=True)],
            "color": COLOURS[0],
        },
        customdata=[*zip(low, high, strict=True)],
        hovertemplate=f"%{{y}}: %{{x:+{form}}} "
        f"[%{{customdata[0]:+{form}}}, %{{customdata[1]:+{form}}}]{unit}<extra></extra>",
    )
    figure.add_vline(x=0, line={"width": 1, "dash": "dot", "color": _GREY})
    figure.update_layout(
        showlegend=False,
        xaxis_title=f"{'percentage points, ' if unit else ''}{metric.better} is better",
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return Plot(title, as_json(figure), height=max(HEIGHT, 70 + ARM * len(gaps)))
