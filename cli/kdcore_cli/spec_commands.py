"""``init``, ``check`` and ``schema``: what a spec says, before anything is run."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from kdcore import registry
from kdcore.errors import UserError, nearest
from kdcore_cli import console
from kdcore_cli.options import AsJson, Sets, SpecFile

Job = Annotated[str, typer.Argument(metavar="JOB", help="What kind of run the spec describes.")]


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(
        "spec.yaml"
    ),
    job: Annotated[str, typer.Option("--job", help="What kind of run it describes.")] = "distill",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a commented spec to begin from.

    kdcore init my-run.yaml
    """
    starters = {path.name.removesuffix(".yaml"): path for path in files(__package__).joinpath("starters").iterdir()}
    ...


def schema(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The kind of run.")] = "distill",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.")
    ] = None,
) -> None:
    """Print the JSON schema of specs, with every installed component.

    An editor that knows it completes and checks a spec while it is written. Begin the spec with:
    # yaml-language-server: $schema=spec.schema.json

    kdcore schema -o spec.schema.json
    """
    from kdcore.json_schema import json_schema
    from kdcore.specs import JOBS

    if job not in JOBS:
        raise UserError(f"there is no job '{job}'", nearest(job, JOBS))
    found = registry.installed()
    console.warn_of_problems(found)
    text = json.dumps(json_schema(JOBS[job], found), indent=2)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", "utf-8")
