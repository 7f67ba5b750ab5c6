"""``report``: runs as a page that opens from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcore_cli import console


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of one or several runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The page. By default report.html in the run's folder; of several, in this one.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the file, even if it is no such page."),
    ] = False,
) -> None:
    """Draw runs as one HTML page, finished or not.

    The page needs no network. It shows the figures before and after, the loss and what was logged
    beside it, what the gates accept, a speculative decode round by round, speed-ups, the spec and
    the versions: whatever the runs have. Several runs are drawn over each other.

    For example:

    kdcore report runs/distill

    kdcore report runs/a runs/b --output both.html
    """
    from kdcore import library

    console.tell(f"page: {library.report(*runs, out=output, overwrite=overwrite)}")
