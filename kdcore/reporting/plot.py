"""A plot of the page: a figure for plotly.js, and a legend that is the page's own.

plotly's legend takes its room from the plot. The page's stands below it, and what all plots of a
section have in common, the runs, stands once above them.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

COLOURS = (
    "#4c86d8", "#e0802a", "#2f9e77", "#d4526e", "#8f6fd1", "#a08437", "#3fa7b5", "#c965b0",
)  # fmt: skip
"""Told apart on white and on black, and by people who do not see red or green."""
DASHES = {
    "solid": "",
    "dash": "7 5",
    "dot": "2 4",
    "dashdot": "7 4 2 4",
    "longdash": "11 5",
    "longdashdot": "11 4 2 4",
}
"""plotly's name of a dash -> the same as SVG's lengths."""
UNIFIED = 10
"""Lines that one box may tell of when the mouse points at a step; of more, the nearest is told."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend. mark: what the lines that it speaks of bear in their ``meta``."""

    mark: str
    name: str
    colour: str
    dash: str = "solid"

    @property
    def stroke(self) -> str:
        """The dash as SVG writes it."""
        return DASHES[self.dash]


@dataclass(frozen=True)
class Plot:
    """A title with a figure as plotly's JSON. sentence: why there is none, or what is left out.

    keys: its legend, if it has one. height: pixels, where it differs from that of the others.
    """

    title: str
    figure: dict[str, Any] | None
    sentence: str = ""
    keys: tuple[Key, ...] = ()
    height: int | None = None


def colour(place: int, count: int) -> str:
    """Of one among ``count``; when there are more than COLOURS, they go once round the wheel."""
    if count <= len(COLOURS):
        return COLOURS[place]
    return f"hsl({360 * place // count}, 55%, {(45, 60)[place % 2]}%)"


def dash(place: int) -> str:
    """Of one, as plotly names it; after the last comes the first again."""
    return tuple(DASHES)[place % len(DASHES)]


def told(form: str, lines: int, unit: str = "") -> tuple[str, dict[str, Any]]:
    """What each line tells when pointed at, as plotly's template, and the layout that goes with it.

    form: of a value, as Python writes it; unit: what stands behind it.
    """
    if lines <= UNIFIED:
        return f"%{{y:{form}}}{unit}", {"hovermode": "x unified"}
    return f"%{{fullData.name}}<br>%{{x}}: %{{y:{form}}}{unit}<extra></extra>", {
        "hovermode": "closest"
    }


def text(words: str) -> str:
    """As plotly takes it, which reads some markup in names."""
    return html.escape(words)


def as_json(figure: go.Figure) -> dict[str, Any]:
    """What plotly.js takes, without a theme of its own: the page gives the colours."""
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        showlegend=False,
        hoverlabel={"namelength": -1},
    )
    plain: dict[str, Any] = json.loads(figure.to_json())  # what is no number is null in it
    plain["layout"].pop("template", None)
    return plain
