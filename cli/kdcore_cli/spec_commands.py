"""``init``, ``check`` and ``schema``: what a spec says, before anything is run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kdcore import registry
from kdcore.errors import UserError, nearest
from kdcore_cli import console
from kdcore_cli.options import AsJson, Sets, SpecFile, as_words
from kdcore_cli.quiet_libraries import quieten

STARTERS = Path(__file__).parent / "starters"


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(
        "spec.yaml"
    ),
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="The kind of run.")] = "distill",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a commented spec to begin from.

    For example:

    kdcore init my-run.yaml
    """
    starter = STARTERS / f"{job}.yaml"
    if not starter.is_file():
        known = [path.stem for path in STARTERS.iterdir()]
        raise UserError(f"there is no job '{job}'", nearest(job, known))
    try:
        with file.open("w" if overwrite else "x", encoding="utf-8") as opened:
            opened.write(starter.read_text("utf-8"))
    except FileExistsError:
        cure = "name another file, or replace it with --overwrite"
        raise UserError(f"{file} is there already", cure) from None
    except OSError as fault:
        cure = "name a file in a folder you may write to"
        raise UserError(f"{file} cannot be written: {fault.strerror}", cure) from None
    console.tell(f"wrote {file}; next: kdcore check {file}")


def schema(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The kind of run.")] = "distill",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.")
    ] = None,
) -> None:
    """Print the JSON schema of specs, with every installed component.

    An editor that knows it completes and checks a spec while it is written. Begin the spec with:
    # yaml-language-server: $schema=spec.schema.json

    For example:

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


def check(spec: SpecFile, sets: Sets = None, as_json: AsJson = False) -> None:
    """Say what a spec would do, and what is wrong with it. Trains nothing.

    For example:

    kdcore check spec.yaml

    kdcore check spec.yaml --set data.max_length=512
    """
    from kdcore.runs import Run
    from kdcore.spec_file import read_spec
    from kdcore.specs import DistillSpec

    found = registry.installed()
    asked = read_spec(spec, sets or [], registry=found)
    console.warn_of_problems(found)
    if not isinstance(asked, DistillSpec):
        raise UserError(f"{spec} is no distill spec", "write job: distill in it")
    quieten()
    from kdcore.preflight import preflight

    from kdcore_cli.check_report import show_report

    report = preflight(asked, registry=found)
    if as_json:
        console.print_json(dataclasses.asdict(report))
        return
    show_report(console.out(), report)
    line = shlex.join(["kdcore", "distill", str(spec), *as_words(sets)])
    if Run(asked.run).path("run.json").exists():
        console.tell(f"{asked.run} holds a run already: --resume, --overwrite or --out DIR")
    console.tell(f"ready: {line}")
