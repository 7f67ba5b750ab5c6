"""Plots of the logged metrics over the steps: one plot holds the lines of all runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from kdcore.reporting.plot import Key, Plot, as_json, colour, dash, text, told
from kdcore.reporting.run_record import RunRecord

POINTS = 4000
"""Maximum of points per plot, over all lines: far more than a screen shows, 0.1 MB of the page."""


@dataclass(frozen=True)
class Curves:
    """A plot that a run may have.

    Attributes:
        title: The plot's title.
        names: The pattern of the names of its metrics.
        missing: The sentence that replaces the plot if there are none; empty to leave it out.
        form: The format spec of its values.
    """

    title: str
    names: str
    missing: str
    form: str = ".4g"


OVER_STEPS = (
    Curves(
        "Loss and its terms", r"loss|(auxiliary/)?term/.+", "The run has not logged a step yet."
    ),
    Curves(
        "Acceptance rate of each gate",
        r"acceptance/.+",
        "The run has not logged acceptance rates: the method has no gates, or the run has not "
        "logged a step yet.",
        ".1%",
    ),
    Curves(
        "Gradient signal-to-noise ratio of each term",
        r"gsnr/.+",
        "The run has not logged gradient signal-to-noise ratios: set training.probe_every.",
    ),
    Curves("Gradient signal-to-noise ratio of each layer", r"gsnr_layer/.+", ""),
    Curves(
        "L2 norm of each momentum buffer",
        r"momentum_norm/.+",
        "The run has not logged momentum norms: training.probe_every is not set, or the momentum "
        "policy does not report norms.",
    ),
)
"""The plots of every training run."""

_UNSET = "The run did not measure during training: set training.eval_every."
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
"""Job -> further plots of its runs."""


def trained(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Select the training runs, which have curves."""
    return [run for run in runs if run.job in HELD_OUT]


def run_keys(runs: Sequence[RunRecord]) -> list[Key]:
    """Return the common legend of all plots: a colour for each run; empty for a single run."""
    if len(runs) < 2:
        return []
    return [
        Key(f"run {place}", run.name, colour(place, len(runs))) for place, run in enumerate(runs)
    ]


def plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Yield the plots of training runs: those of every run, then those of each job."""
    if runs:
        drawn = (_plot(curves, runs, runs) for curves in OVER_STEPS)
        yield from (plot for plot in drawn if plot.figure or plot.sentence)
    for job, wanted in HELD_OUT.items():
        own = [run for run in runs if run.job == job]
        for curves in wanted if own else ():
            yield _plot(curves, own, runs)


def _plot(curves: Curves, drawn: Sequence[RunRecord], runs: Sequence[RunRecord]) -> Plot:
    """Draw a colour per run and a dash per metric; for a single run, a colour per metric."""
    logged = sorted({name for run in drawn for line in run.steps for name in line}, key=_in_order)
    names = [name for name in logged if re.fullmatch(curves.names, name)]
    by_run = {run.name: key for run, key in zip(runs, run_keys(runs), strict=False)}
    by_name = _metric_keys(names, several=bool(by_run))
    lines: dict[tuple[str, str], Sequence[tuple[int, float]]] = {
        (run.name, name): points
        for run in drawn
        for name in names
        if (points := [*_before(run, name), *run.values(name)])
    }
    if not lines:
        return Plot(curves.title, None, curves.missing)
    figure = go.Figure()
    limit = max(4, POINTS // (len(drawn) * len(names)))
    template, layout = told(curves.form, len(lines))
    for (run_name, name), whole in lines.items():
        kept = thinned(whole, limit)
        keys = [*([by_run[run_name]] if by_run else []), by_name[name]]
        figure.add_scatter(
            x=[step for step, _ in kept],
            y=[value for _, value in kept],
            name=text(": ".join(key.name for key in (keys if len(names) > 1 else keys[:1]))),
            meta=[key.mark for key in keys],
            mode="lines+markers" if len(kept) < 40 else "lines",
            line={"color": keys[0].colour, "dash": by_name[name].dash, "width": 1.8},
            marker={"size": 5},
            hovertemplate=template,
        )
    figure.update_layout(layout, xaxis_title="step")
    if curves.form.endswith("%"):
        figure.update_yaxes(tickformat="~%", rangemode="tozero")  # small changes look small
    most = max(map(len, lines.values()))
    said = by_run or names == [curves.names]  # the title names a single metric
    shown = () if len(names) == 1 and said else tuple(by_name.values())
    return Plot(curves.title, as_json(figure), _left_out(most, limit), shown)


def _metric_keys(names: Sequence[str], *, several: bool) -> dict[str, Key]:
    """The legend of the metrics: dashes among several runs, which have colours; else colours.

    A prefix of all names, such as gsnr/, is left out, because the title says it.
    """
    shared = {name.partition("/")[0] for name in names if "/" in name}
    begin = f"{shared.pop()}/" if len(shared) == 1 else ""
    begin = begin if all(name.startswith(begin) for name in names) else ""
    return {
        name: Key(
            f"metric {place}",
            name.removeprefix(begin).removeprefix("eval_"),
            "currentColor" if several else colour(place, len(names)),
            dash(place) if several else "solid",
        )
        for place, name in enumerate(names)
    }


def thinned(points: Sequence[tuple[int, float]], limit: int) -> Sequence[tuple[int, float]]:
    """Thin out a line's points, but keep spikes.

    The line is cut into stretches of equal length; the ends of the line and the lowest and highest
    point of each stretch remain.

    Args:
        points: The (step, value) points.
        limit: Maximum number of points, at least 4.

    Returns:
        The remaining points, in order.
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
        f"The plot shows at most {limit:,} of up to {most:,} points per line: the first, the last, "
        "and the lowest and the highest of each stretch. metrics.jsonl holds all points."
    )


def _before(run: RunRecord, name: str) -> list[tuple[int, float]]:
    """The value before the first step, as a point at step 0, if it was measured."""
    known = run.results.before if run.results else {}
    figure = name.removeprefix("eval_")
    return [(0, known[figure])] if name != figure and figure in known else []


def _in_order(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers in names as numbers: level 10 comes after level 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
