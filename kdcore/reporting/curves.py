"""What is logged over the steps, as plots: each figure's lines of all runs in one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from kdcore.reporting.plot import Key, Plot, as_json, colour, dash, text, told
from kdcore.reporting.run_record import RunRecord

POINTS = 4000
"""Of a plot, over all of its lines: far more than a screen has columns, and 0.1 MB of the page."""


@dataclass(frozen=True)
class Curves:
    """A plot that a run may have. names: pattern of the metrics in it; missing: said without."""

    title: str
    names: str
    missing: str
    form: str = ".4g"


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


def trained(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that there are curves of."""
    return [run for run in runs if run.job in HELD_OUT]


def run_keys(runs: Sequence[RunRecord]) -> list[Key]:
    """The legend of all plots of some trained runs: a colour for each; none for one run."""
    if len(runs) < 2:
        return []
    return [
        Key(f"run {place}", run.name, colour(place, len(runs))) for place, run in enumerate(runs)
    ]


def plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Of trained runs: the plots of all of them, and those of the jobs that are among them."""
    if runs:
        for curves in OVER_STEPS:
            yield _plot(curves, runs, runs)
    for job, wanted in HELD_OUT.items():
        own = [run for run in runs if run.job == job]
        for curves in wanted if own else ():
            yield _plot(curves, own, runs)


def _plot(curves: Curves, drawn: Sequence[RunRecord], runs: Sequence[RunRecord]) -> Plot:
    """One colour for each of all runs, one dash for each metric; of one run, a colour for each."""
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
    said = by_run or names == [curves.names]  # a single metric, by the title
    shown = () if len(names) == 1 and said else tuple(by_name.values())
    return Plot(curves.title, as_json(figure), _left_out(most, limit), shown)


def _metric_keys(names: Sequence[str], *, several: bool) -> dict[str, Key]:
    """By their dashes among several runs, whose colours say which run it is; else by colours.

    What all names begin with, as gsnr/, the title says already.
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
    known = run.results.before if run.results else {}
    figure = name.removeprefix("eval_")
    return [(0, known[figure])] if name != figure and figure in known else []


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers, so that level 10 comes after level 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
