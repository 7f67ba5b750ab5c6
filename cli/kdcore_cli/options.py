"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

SpecFile: TypeAlias = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec file (YAML).")]
Sets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field by its dotted path, e.g. training.steps=100 or method.gates.0.k=3. "
        "May be given several times.",
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; sets `run`.")
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in the folder and start again.")
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Resume the run in the folder, if there is one.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, ... (default: the accelerator if there is one, else cpu).",
    ),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show the results only.")]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the output of the libraries.")
]


def as_words(sets: list[str] | None) -> list[str]:
    """The assignments as a command line has them."""
    return [word for assignment in sets or [] for word in ("--set", assignment)]
