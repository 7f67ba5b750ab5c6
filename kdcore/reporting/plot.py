"""A plot of the page: a figure for plotly.js, and a legend that the page draws itself.

plotly's own legend takes space from the plot. The page draws legends below the plots, and the
legend of the runs, which all plots of a section share, once above them.
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
"""Colours that are distinguishable on white and on black, and by colour-blind readers."""
DASHES = {
    "solid": "",
    "dash": "7 5",
    "dot": "2 4",
    "dashdot": "7 4 2 4",
    "longdash": "11 5",
    "longdashdot": "11 4 2 4",
}
"""plotly's name of a dash -> SVG's stroke-dasharray."""
UNIFIED = 10
"""Maximum number of lines that one hover box shows; with more, it shows the nearest line."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        mark: The mark that the entry's lines have in their ``meta``.
        name: The text.
        colour: The colour of the lines.
        dash: plotly's name of their dash.
    """

    mark: str
    name: str
    colour: str
    dash: str = "solid"

    @property
    def stroke(self) -> str:
        """The dash as SVG's stroke-dasharray."""
        return DASHES[self.dash]


@dataclass(frozen=True)
class Plot:
    """A titled figure of the page.

    Attributes:
        title: The title.
        figure: The figure as plotly's JSON, or None.
        sentence: The reason of a missing figure, or a note below the figure.
        keys: The legend.
        height: The height in pixels, or None for the page's default.
    """

    title: str
    figure: dict[str, Any] | None
    sentence: str = ""
    keys: tuple[Key, ...] = ()
    height: int | None = None


def colour(place: int, count: int) -> str:
    """Return the colour of item ``place`` of ``count``; many items use the whole colour wheel."""
    if count <= len(COLOURS):
        return COLOURS[place]
    return f"hsl({360 * place // count}, 55%, {(45, 60)[place % 2]}%)"


def dash(place: int) -> str:
    """Return plotly's name of the dash of item ``place``, in rotation."""
    return tuple(DASHES)[place % len(DASHES)]


def told(form: str, lines: int, unit: str = "") -> tuple[str, dict[str, Any]]:
    """Return plotly's hover template and the layout that it needs.

    Args:
        form: The format spec of a value.
        lines: The number of lines in the plot.
        unit: The text after a value.

    Returns:
        The template and the layout.
    """
    if lines <= UNIFIED:
        return f"%{{y:{form}}}{unit}", {"hovermode": "x unified"}
    return f"%{{fullData.name}}<br>%{{x}}: %{{y:{form}}}{unit}<extra></extra>", {
        "hovermode": "closest"
    }


def text(words: str) -> str:
    """Escape a text for plotly, which reads markup in names."""
    return html.escape(words)


def as_json(figure: go.Figure) -> dict[str, Any]:
    """Convert a figure to plotly's JSON, without a theme: the page sets the colours."""
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        showlegend=False,
        hoverlabel={"namelength": -1},
    )
    plain: dict[str, Any] = json.loads(figure.to_json())  # to_json writes NaN as null
    plain["layout"].pop("template", None)
    return plain
