"""Commands ``init``, ``check`` and ``schema``, which read or write specs and run nothing."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcore.components import registry
from kdcore.errors import UserError
from kdcore.runs.whole_files import unwritable, write_text
from kdcore_cli.options import AsJson, Quiet, Sets, SpecFile, Verbose, as_words
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Spec file to write.")] = Path(
        "spec.yaml"
    ),
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="Job of the spec.")] = "distill",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Your conversations (.jsonl, .csv, .parquet, .json): fill in the spec for them.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Write a commented starter spec and a few prompts.

    For example:

    kdcore init my-run.yaml

    kdcore init my-run.yaml --data chats.jsonl
    """
    found = registry.installed()
    chosen = found.job(job)
    following = "check" if chosen.preflight else job
    _refuse_existing(file, overwrite)
    if data is not None:
        from kdcore.jobs.starters.own_data import spec_of

        own = spec_of(chosen, data, file, found)
        _write(file, own.text)
        for line in (*own.findings, f"wrote {file}; next: kdcore {following} {file}"):
            console.tell(line)
        return
    (_, text), *beside = chosen.starter().items()
    rows = [(file.with_name(name), prompts) for name, prompts in beside]
    kept = [str(path) for path, _ in rows if path.exists()]  # it may be the user's own
    lacking = [each for each in rows if not each[0].exists()]
    _write(file, text, lacking)
    if kept:
        console.tell(f"kept {', '.join(kept)}, which already existed")
    written = [file, *(path for path, _ in lacking)]
    console.tell(f"wrote {', '.join(map(str, written))}; next: kdcore {following} {file}")


def _refuse_existing(file: Path, overwrite: bool) -> None:
    """Raises UserError if a file exists, a broken link included, and must not be replaced."""
    if not overwrite and os.path.lexists(file):
        cure = "name another file, or add --overwrite to replace it"
        raise UserError(f"{file} already exists", cure)


def _write(file: Path, text: str, beside_it: Sequence[tuple[Path, str]] = ()) -> None:
    """Write a file in one step, through a link; raises UserError if it is not writable.

    Files beside it are written before it appears: a spec that exists has its prompts.
    """
    place = Path(os.path.realpath(file))
    try:
        for path, content in (*beside_it, (place, text)):
            write_text(path, content)
    except OSError as fault:
        raise unwritable(file, fault, "name a file in a writable folder") from None


def schema(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job of the specs.")] = "distill",
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write (default: stdout)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Print the JSON schema of specs, for an editor.

    The schema lists every installed component. An editor with the schema completes and validates a
    spec as you type. Start the spec with:
    # yaml-language-server: $schema=spec.schema.json

    For example:

    kdcore schema -o spec.schema.json
    """
    from kdcore.specs.json_schema import json_schema

    found = registry.installed()
    model = found.job(job).spec
    console.warn_of_problems(found)
    text = json.dumps(json_schema(model, found), indent=2) + "\n"
    if output is None:
        console.write(text)
    else:
        _refuse_existing(output, overwrite)
        _write(output, text)


def check(
    spec: SpecFile,
    sets: Sets = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Validate a spec and estimate its cost, without training.

    For example:

    kdcore check spec.yaml

    kdcore check spec.yaml --set data.max_length=512
    """
    from kdcore.runs.folder import Run
    from kdcore.specs.reading.file import placing, read_spec

    found = registry.installed()
    asked: Any = read_spec(spec, sets or [], registry=found)
    console.warn_of_problems(found)
    job = found.job(asked.job)
    if not job.preflight:
        raise UserError(
            f"job '{asked.job}' does not have a check", f"run the spec: kdcore {asked.job} {spec}"
        )
    quieten(quiet, verbose)
    from kdcore_cli.terminal.check_report import report_of

    with placing(spec, sets or []):
        report = job.look_ahead(asked, registry=found)
    if as_json:
        console.print_json(report)
        return
    report_of(job)(console.out(), report, asked)
    line = shlex.join(["kdcore", asked.job, str(spec), *as_words(sets)])
    run = Run(asked.run, planned=True) if job.run_folder else None
    if run and run.path("run.json").exists() and not run.is_barren():
        console.tell(f"{asked.run} already contains a run: add --resume, --overwrite or --out DIR")
    console.tell(f"ready: {line}")
