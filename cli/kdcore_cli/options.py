"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from kdcore.errors import UserError

SpecFile: TypeAlias = Annotated[Path, typer.Argument(metavar="SPEC", help="Spec file (YAML).")]
Sets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a field of the spec by its path, e.g. training.steps=100 or "
        "method.gates.0.k=3. May be given several times.",
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AsTable: TypeAlias = Annotated[
    Literal["csv", "latex", "markdown"] | None,
    typer.Option("--table", help="Print the tables with their intervals in this format."),
]
Metric: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Metric to show (default: the first one measured; with --table all).",
    ),
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; overrides the field `run`.")
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in the folder and start a new one.")
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Resume the run in the folder, if it contains one.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, ... (default: the accelerator if there is one, else cpu).",
    ),
]
On: TypeAlias = Annotated[
    Literal["ray"] | None,
    typer.Option(
        "--on",
        help="Spread the work over a Ray cluster: that of RAY_ADDRESS, else the one on this "
        "machine, else a new one (default: this process does it).",
    ),
]
Share: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="N/M",
        help="Run share N of M of the cells; other processes run the other shares, and the last "
        "process to finish writes the table.",
    ),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print the results only.")]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the output of the libraries too.")
]


def share_of(text: str | None) -> tuple[int, int] | None:
    """Return the numbers of a share.

    Args:
        text: Value of ``--share``.

    Returns:
        (N, M); None without the option.

    Raises:
        UserError: The value is not N/M with 1 <= N <= M.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,6})/([1-9]\d{0,6})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"--share {text} is not a share", "write N/M with 1 <= N <= M, e.g. 1/4")
    return int(found[1]), int(found[2])


def as_words(sets: list[str] | None) -> list[str]:
    """Return the assignments as words of a command line.

    Args:
        sets: Values of ``--set``.

    Returns:
        ``--set`` and each value, in turn.
    """
    return [word for assignment in sets or [] for word in ("--set", assignment)]
