"""Draws the docs' pictures from stored results of runs, by the code that draws `kdcore report`.

python docs/pictures/draw.py [PICTURE ...]

A folder of `results/` has what a report reads of a run: `kdcore report docs/pictures/results/NAME`
shows all of its plots. Each picture is one of them, and names in a comment the digest of the
figure, so that a test finds a picture that is older than its results. chromium renders it.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from kdcore.reporting.curves import plots, trained
from kdcore.reporting.outcomes import bench_plots, comparison_plots
from kdcore.reporting.plot import Plot
from kdcore.reporting.run_record import read_runs

HERE = Path(__file__).parent
WIDTH, HEIGHT = 760, 340
INK, LINES, PAPER = "#222", "#e4e4e4", "#fff"
"""The paper is white in a dark theme too: an SVG in an <img> does not see the page's colours."""


@dataclass(frozen=True)
class Picture:
    """A picture of the docs.

    Attributes:
        run: The folder of `results/`.
        title: The title of one of its plots.
    """

    run: str
    title: str


PICTURES = {
    "decoding_speeds": Picture(
        "smollm2_decoding",
        "Mean speed-up over generate: temperature 0, batch size 1, threads 2",
    ),
    "untrained_speeds": Picture(
        "smollm2_untrained",
        "Mean speed-up over generate: temperature 0, batch size 1, threads 2",
    ),
    "drafters_tau": Picture("smollm2_drafters", "tau of a chain: difference from fasteagle"),
    "cross_tokenizer_perplexity": Picture(
        "smollm2_cross_tokenizer", "perplexity: difference from labels"
    ),
    "clinc150_accuracy": Picture(
        "clinc150_deepkd", "accuracy against the labels: difference from kd"
    ),
    "banking77_accuracy": Picture(
        "banking77_deepkd", "accuracy against the labels: difference from kd"
    ),
    "digits_gsnr": Picture("digits_curves", "Gradient signal-to-noise ratio of each term"),
    "digits_acceptance": Picture("digits_curves", "Acceptance rate of each gate"),
}


def figure_of(picture: Picture) -> dict[str, Any]:
    """Build a picture's figure, as plotly's JSON with the docs' colours and a legend."""
    (found,) = (plot for plot in _plots(picture.run) if plot.title == picture.title)
    assert found.figure is not None, found.sentence
    axis = {"gridcolor": LINES, "linecolor": LINES, "zerolinecolor": LINES, "automargin": True}
    layout = found.figure["layout"]
    layout |= {name: layout.get(name, {}) | axis for name in ("xaxis", "yaxis")}
    return found.figure | {
        "layout": layout
        | {
            "width": WIDTH,
            "height": found.height or HEIGHT,
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "font": {"color": INK, "family": "sans-serif", "size": 12},
            "title": {"text": html.escape(found.title), "x": 0.01, "font": {"size": 14}},
            "margin": {"l": 56, "r": 16, "t": 44, "b": 56},
            "showlegend": len(found.keys) > 1,
        }
    }


def digest(figure: Mapping[str, Any]) -> str:
    """The digest of a figure, which its picture names."""
    return hashlib.sha256(json.dumps(figure, sort_keys=True).encode()).hexdigest()[:16]


def drawn(figure: Mapping[str, Any]) -> str:
    """Render a figure as SVG, which begins with a comment that has its digest."""
    page = (
        "<!doctype html><meta charset='utf-8'><body></body>"
        # plotly draws ids; a seed makes two renderings equal
        "<script>let s = 1; Math.random = () => (s = s * 16807 % 2147483647) / 2147483647</script>"
        f"<script>{get_plotlyjs()}</script><script>"
        f"Plotly.toImage({json.dumps(figure)}, {{format: 'svg'}}).then(made => {{"
        "document.body.textContent = decodeURIComponent(made.slice(made.indexOf(',') + 1))})"
        "</script>"
    )
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("error: there is no chromium\nfix: install chromium, and put it on the path")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
        command = [browser, *options, f"--user-data-dir={folder}/chromium", "--dump-dom"]
        dumped = subprocess.run(
            [*command, file.as_uri()], capture_output=True, text=True, check=True
        ).stdout
    body = re.search(r"<body>(&lt;svg.*?)</body>", dumped, re.DOTALL)
    assert body is not None, "plotly drew nothing"
    return f"<!-- figure {digest(figure)} -->\n{html.unescape(body[1])}\n"


def _plots(run: str) -> Iterator[Plot]:
    runs = read_runs([HERE / "results" / run])
    yield from plots(trained(runs))
    yield from bench_plots(runs)
    for each in runs:
        yield from comparison_plots(each.comparison) if each.comparison else ()


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        (HERE / f"{name}.svg").write_text(drawn(figure_of(PICTURES[name])))
