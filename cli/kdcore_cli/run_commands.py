"""``distill`` and ``evaluate``."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

from kdcore import registry
from kdcore.errors import UserError
from kdcore_cli import console
from kdcore_cli.options import AsJson, Sets, SpecFile, as_words
from kdcore_cli.quiet_libraries import quieten


class Interrupted(Exception):
    """A run was interrupted; ``resume`` is the command line that goes on with it."""

    def __init__(self, resume: str) -> None:
        super().__init__(resume)
        self.resume = resume


def distill(
    spec: SpecFile,
    sets: Sets = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder; sets `run`.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the folder and start again.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the results only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let the libraries say what they do.")
    ] = False,
) -> None:
    """Train a student from a teacher.

    The run folder then holds the student (plain transformers), the metrics and a model card.

    For example:

    kdcore distill spec.yaml

    kdcore distill spec.yaml --set training.steps=50 --out runs/short

    kdcore distill spec.yaml --resume
    """
    from kdcore.spec_file import read_spec
    from kdcore.specs import DistillSpec
    from kdcore_cli.progress import progress_on
    from kdcore_cli.tables import show_results

    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other", "give one of them")
    assignments = [*(sets or []), *([f"run={json.dumps(str(out))}"] if out else [])]
    found = registry.installed()
    asked = read_spec(spec, assignments, registry=found)
    if not isinstance(asked, DistillSpec):
        raise UserError(f"{spec} is no distill spec", "write job: distill in it")
    console.warn_of_problems(found)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill can be resumed too
    try:
        if not verbose:
            quieten(downloads=not quiet)
        from kdcore.distill import distill as distill_run

        run = distill_run(
            asked,
            registry=found,
            overwrite=overwrite,
            resume=resume,
            progress=progress_on(console.err(), quiet),
        )
    except KeyboardInterrupt:
        words = ["kdcore", "distill", str(spec), *as_words(sets)]
        words += ["--out", str(out)] if out else []
        raise Interrupted(shlex.join([*words, "--resume"])) from None
    if not run.writes:  # one of several processes, and not the one that speaks
        return
    show_results(console.out(), run.read_json("results.json"))
    console.tell(f"student: {run.path('model')}")


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    as_json: AsJson = False,
) -> None:
    """Show the results of a finished run again.

    For example:

    kdcore evaluate runs/distill
    """
    from kdcore.runs import Run
    from kdcore_cli.tables import show_results

    run = Run(folder)
    if not run.path("run.json").exists():
        raise UserError(f"{folder} holds no run", "name the folder of a run, e.g. runs/distill")
    results = run.read_json("results.json")
    if not results:
        status = run.read_json("run.json").get("status")
        raise UserError(
            f"the run in {folder} has no results; its status is '{status}'",
            "finish it: the command that began it, with --resume",
        )
    if as_json:
        console.print_json(results)
    else:
        show_results(console.out(), results)
