"""The report page, laid out by a template that escapes all of the runs' data.

The page loads nothing: it contains plotly.js once. Its content security policy allows only its two
scripts, by their hashes, so that text in a run's data can never run as a script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kdcore.reporting.curves import plots, run_keys, trained
from kdcore.reporting.outcomes import bench_plots, comparison_plots, replay_plot
from kdcore.reporting.report_tables import (
    SAME,
    bench_table,
    comparison_table,
    controls_table,
    held_out_table,
    notes,
    overview,
    turns_table,
    versions,
)
from kdcore.reporting.run_record import RunRecord, read_runs
from kdcore.reporting.tree_drawing import drawing

GENERATOR = "kdcore report"
NAMED = 3
"""Number of runs that the title names and whose first examples are open; others are counted."""


def report(folders: Sequence[Path]) -> str:
    """Draw the page of runs.

    Args:
        folders: The run folders.

    Returns:
        The page as HTML.

    Raises:
        UserError: A folder is not a run folder, or a file does not have kdcore's format.
    """
    return page(read_runs(folders))


def is_report(file: Path) -> bool:
    """Check whether a file is a report page, by the generator mark near its beginning.

    Args:
        file: The file.

    Returns:
        Whether it is one.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in opened.read(1024)


def page(runs: Sequence[RunRecord]) -> str:
    """Draw the page of runs; a lone surrogate, which no file can hold, becomes a "?"."""
    environment = Environment(
        loader=PackageLoader("kdcore.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters["drawing"] = drawing
    folder = Path(__file__).parent / "page"
    scripts = [get_plotlyjs(), (folder / "page.js").read_text("utf-8")]
    learners = trained(runs)
    drawn = environment.get_template("page.html").render(
        generator=GENERATOR,
        title=_title([run.name for run in runs]),
        runs=runs,
        open_runs=NAMED,
        policy=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup((folder / "page.css").read_text("utf-8")),
        overview=overview(runs),
        heldout=held_out_table(runs),
        learners=learners,
        run_keys=run_keys(learners),
        curves=list(plots(learners)),
        same=SAME,
        benches=[
            (run, bench_table(run.bench.rows), turns_table(run.bench.rows))
            for run in runs
            if run.bench
        ],
        bench_plots=list(bench_plots(runs)),
        replay_plots={run.name: replay_plot(run) for run in runs},
        comparisons=[
            (
                run,
                comparison_table(run.comparison),
                list(notes(run.comparison)),
                list(comparison_plots(run.comparison)),
                controls_table(run.comparison),
            )
            for run in runs
            if run.comparison
        ],
        versions=versions(runs),
    )
    return drawn.encode("utf-8", "replace").decode("utf-8")


def _title(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
