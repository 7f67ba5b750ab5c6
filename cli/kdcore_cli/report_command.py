"""``report``: runs as a page that opens from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcore.errors import UserError
from kdcore.runs.whole_files import beside, write_whole
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
    from kdcore.reporting.page import report as page_of

    place = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    _refuse_other(place, overwrite)
    page = page_of(runs)
    try:
        write_whole(place, page)
    except OSError as fault:
        beside(place).unlink(missing_ok=True)
        raise UserError(
            f"{place} cannot be written: {fault.strerror}", "name another file with --output"
        ) from fault
    console.tell(f"page: {place.resolve()}")


def _refuse_other(place: Path, overwrite: bool) -> None:
    """Raises UserError for what is there and is no page of ours, unless it may be replaced."""
    from kdcore.reporting.page import is_report

    if not place.exists():
        return
    if not place.is_file():
        raise UserError(f"{place} is no plain file", "name another file with --output")
    try:
        ours = overwrite or is_report(place)
    except OSError:
        ours = False
    if not ours:
        raise UserError(
            f"{place} already exists and is not a page of kdcore report",
            "name another file with --output, or replace it with --overwrite",
        )
