"""Command ``report``: write runs as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcore_cli.terminal import console


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of one or more runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Page to write (default: report.html in the run's folder; in the working "
            "directory for several runs).",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the file, even if it is not a report."),
    ] = False,
) -> None:
    """Write an HTML page about one or more runs.

    The runs may be unfinished. The page requires no network. It shows what the runs recorded:
    metrics before and after, the loss and other logged values, the tokens that the gates accept, a
    speculative decode round by round, speed-ups, the spec and the versions. The curves of several
    runs share their plots.

    For example:

    kdcore report runs/distill

    kdcore report runs/a runs/b --out both.html
    """
    from kdcore import library

    console.tell(f"page: {library.report(*runs, out=output, overwrite=overwrite)}")
