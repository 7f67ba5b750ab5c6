"""What is logged over the steps, as plots: each figure's lines of all runs in one."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from kdcore.reporting.run_record import RunRecord

COLOURS = (
    "#4c86d8", "#e0802a", "#2f9e77", "#d4526e", "#8f6fd1", "#a08437", "#3fa7b5", "#c965b0",
)  # fmt: skip
"""Told apart on white and on black, and by people who do not see red or green."""
POINTS = 4000
"""Of a plot, over all of its lines: far more than a screen has columns, and 0.1 MB of the page."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Curves:
    """A plot that a run may have. names: pattern of the metrics in it; missing: said without."""

    title: str
    names: str
    missing: str
    form: str = ".4g"


@dataclass(frozen=True)
class Plot:
    """A title with a figure as plotly's JSON. sentence: why there is none, or what is left out."""

    title: str
    figure: dict[str, Any] | None
    sentence: str = ""


OVER_STEPS = (
    Curves("Loss and its terms", r"loss|term/.+", "No step was logged, so there is no loss yet."),
    Curves(
        "Acceptance rate of each gate",
        r"acceptance/.+",
        "No gate's acceptance was logged: the method has no gates, or no step was logged.",
        ".1%",
    ),
    Curves(
        "Gradient signal-to-noise ratio of each component",
        r"gsnr/.+",
        "The gradients' signal-to-noise ratios were not logged: training.probe_every is not set.",
    ),
    Curves(
        "Norm of each momentum",
        r"momentum_norm/.+",
        "The momenta's norms were not logged: training.probe_every is not set, or there is none.",
    ),
)
"""Of every run that trains."""

_UNSET = "Nothing was measured on the way: training.eval_every is not set."
HELD_OUT = {
    "distill": (
        Curves("Held-out teacher KL (nats/token)", "eval_teacher_kl", _UNSET),
        Curves("Held-out perplexity", "eval_perplexity", _UNSET),
        Curves(
            "Held-out rates",
            r"eval_(agreement|acceptance|accuracy|gate/.+)",
            _UNSET,
            ".1%",
        ),
    ),
    "train-drafter": (
        Curves("Held-out tau (tokens per verification)", r"eval_tau(_tree)?", _UNSET),
        Curves("Held-out accuracy of each level", r"eval_level_\d+", _UNSET, ".1%"),
    ),
}
"""Of the job."""


def plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Those of every run that trains, and those of the jobs that are among them."""
    trained = [run for run in runs if run.job in HELD_OUT]
    if trained:
        for curves in OVER_STEPS:
            yield _plot(curves, trained)
    for job, wanted in HELD_OUT.items():
        own = [run for run in trained if run.job == job]
        for curves in wanted if own else ():
            yield _plot(curves, own)


def _plot(curves: Curves, runs: Sequence[RunRecord]) -> Plot:
    """One colour for each run, one dash for each metric; of one run, a colour for each metric."""
    names = sorted({name for run in runs for line in run.steps for name in line}, key=_in_order)
    drawn = [name for name in names if re.fullmatch(curves.names, name)]
    figure = go.Figure()
    several = len(runs) > 1
    limit = max(4, POINTS // max(1, len(runs) * len(drawn)))
    most = 0
    for place, run in enumerate(runs):
        for number, name in enumerate(drawn):
            measured = [*_before(run, name), *run.values(name)]
            if not measured:
                continue
            most = max(most, len(measured))
            points = thinned(measured, limit)
            shown = name.removeprefix("eval_")
            title = f"{run.name}: {shown}" if several and len(drawn) > 1 else shown
            title = run.name if several and len(drawn) == 1 else title
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                name=html.escape(title),
                mode="lines+markers" if len(points) < 40 else "lines",
                line={
                    "color": COLOURS[(place if several else number) % len(COLOURS)],
                    "dash": DASHES[number % len(DASHES)] if several else "solid",
                    "width": 1.8,
                },
                marker={"size": 5},
                hovertemplate=f"%{{y:{curves.form}}}",
            )
    if not figure.data:
        return Plot(curves.title, None, curves.missing)
    figure.update_layout(hovermode="x unified", xaxis_title="step", showlegend=True)
    if curves.form.endswith("%"):
        figure.update_yaxes(tickformat="~%", rangemode="tozero")  # small changes look small
    return Plot(curves.title, as_json(figure), _left_out(most, limit))


def thinned(points: Sequence[tuple[int, float]], limit: int) -> Sequence[tuple[int, float]]:
    """At most ``limit`` (>= 4) of a line's points: its ends, and each stretch's lowest and highest.

    A stretch is a run of as many points as every other; a spike of one point is thus kept.
    """
    if len(points) <= limit:
        return points
    stretches = limit // 2 - 1
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        begin, end = (len(points) * (stretch + side) // stretches for side in (0, 1))
        kept |= {find(range(begin, end), key=lambda at: points[at][1]) for find in (min, max)}
    return [points[at] for at in sorted(kept)]


def _left_out(most: int, limit: int) -> str:
    if most <= limit:
        return ""
    return (
        f"Of up to {most:,} points a line at most {limit:,} are drawn: the first, the last, and "
        "the lowest and the highest of each stretch. metrics.jsonl holds them all."
    )


def _before(run: RunRecord, name: str) -> list[tuple[int, float]]:
    """What was measured before the first step."""
    known = run.judged.before if run.judged else {}
    figure = name.removeprefix("eval_")
    return [(0, known[figure])] if name != figure and figure in known else []


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers, so that level 10 comes after level 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def as_json(figure: go.Figure) -> dict[str, Any]:
    """What plotly.js takes, without a theme of its own: the page gives the colours."""
    figure.update_layout(template="none", margin={"l": 56, "r": 12, "t": 30, "b": 44})
    figure.update_layout(
        colorway=list(COLOURS), legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"}
    )
    plain: dict[str, Any] = json.loads(figure.to_json())  # what is no number is null in it
    plain["layout"].pop("template", None)
    return plain
