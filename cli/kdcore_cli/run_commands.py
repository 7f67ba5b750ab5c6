"""The commands that carry out a spec as a run."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcore.errors import UserError, nearest
from kdcore.method import registry
from kdcore_cli import console
from kdcore_cli.interruption import Interrupted
from kdcore_cli.options import (
    AsJson,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Sets,
    SpecFile,
    Verbose,
    as_words,
)
from kdcore_cli.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.reporting.run_record import RunRecord
    from kdcore.runs.folder import Run


def distill(
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Train a student from a teacher.

    The run folder then holds the student (plain transformers), the metrics and a model card.

    For example:

    kdcore distill spec.yaml

    kdcore distill spec.yaml --set training.steps=50 --out runs/short

    kdcore distill spec.yaml --resume
    """
    run = _carried_out("distill", spec, sets, out, overwrite, resume, quiet, verbose)
    _show(run, "student", run.path("model"), as_json)


def train_drafter(
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Train a drafter, to decode faster with the same output.

    The run folder then holds the drafter that did best on the held-out rows, the metrics and a
    model card.

    For example:

    kdcore train-drafter drafter.yaml

    kdcore train-drafter drafter.yaml --set training.steps=50 --out runs/short
    """
    run = _carried_out("train-drafter", spec, sets, out, overwrite, resume, quiet, verbose)
    _show(run, "drafter", run.path("drafter"), as_json)


def compare(
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric", metavar="NAME", help="The metric to show (default: the first one measured)."
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Train by several methods and seeds, and compare them.

    Each difference from the baseline comes with a 95 % interval over the held-out rows and the
    seeds, and each arm with what it cost. The run folder then holds comparison.json, and
    comparison.html with every figure.

    For example:

    kdcore compare compare.yaml

    kdcore compare compare.yaml --set controls=true --resume
    """
    from kdcore.runs.comparison_results import COMPARISON
    from kdcore_cli.comparison_table import show_comparison

    run = _carried_out("compare", spec, sets, out, overwrite, resume, quiet, verbose)
    outcome = _drawn(run, "comparison.html").comparison
    assert outcome is not None, "which the job has just written"
    known = [each.name for each in outcome.metrics]
    metric = metric or known[0]
    if metric not in known:
        raise UserError(f"there is no figure '{metric}'", nearest(metric, known))
    if as_json:
        console.print_json(COMPARISON.plain(outcome))
    else:
        show_comparison(console.out(), outcome, metric)
        console.tell(f"page: {run.path('comparison.html')}")


def bench(
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Decode by several methods side by side, for their speed.

    The run folder then holds bench.json, bench.html, and every measurement.

    For example:

    kdcore bench bench.yaml

    kdcore bench bench.yaml --set limit=4 --out runs/quick
    """
    from kdcore.runs.comparison_results import BENCH_RESULTS
    from kdcore_cli.bench_table import show_bench

    run = _carried_out("bench", spec, sets, out, overwrite, resume, quiet, verbose)
    outcome = _drawn(run, "bench.html").bench
    assert outcome is not None, "which the job has just written"
    if as_json:
        console.print_json(BENCH_RESULTS.plain(outcome))
    else:
        show_bench(console.out(), outcome)
        console.tell(f"page: {run.path('bench.html')}")


def generate_data(
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Let a teacher, here or behind an endpoint, answer prompts.

    The run folder then holds responses.jsonl, which the chat source reads.

    For example:

    kdcore generate-data generate-data.yaml

    kdcore generate-data generate-data.yaml --resume
    """
    run = _carried_out("generate-data", spec, sets, out, overwrite, resume, quiet, verbose)
    came = run.facts.responses
    assert came is not None, "which the job has just written"
    speed = came.tokens / came.seconds if came.tokens else 0.0
    console.tell(
        f"{came.responses} responses, {came.ended / came.responses:.0%} ended by "
        f"themselves; {came.tokens} tokens now, {speed:.0f} a second: "
        f"{run.path('responses.jsonl')}"
    )


def _show(run: Run, what: str, place: Path, as_json: bool) -> None:
    """What came of a training. Of several processes, one speaks."""
    from kdcore.runs.results import TRAINING_RESULTS
    from kdcore_cli.tables import show_results

    if not run.writes:
        return
    results = run.read(TRAINING_RESULTS)
    assert results is not None, "which the job has just written"
    if as_json:
        console.print_json(TRAINING_RESULTS.plain(results))
    else:
        show_results(console.out(), results)
        console.tell(f"{what}: {place}")


def _drawn(run: Run, name: str) -> RunRecord:
    """What a run's folder tells, after it is drawn there as `kdcore report` would."""
    from kdcore.reporting.page import page
    from kdcore.reporting.run_record import read_runs

    (record,) = read_runs([run.folder])
    run.write_text(name, page([record]))
    return record


def _carried_out(
    job: str,
    file: Path,
    sets: list[str] | None,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    verbose: bool,
) -> Run:
    """Read a spec and do what it says."""
    from kdcore import library
    from kdcore.specs.jobs import JOBS
    from kdcore.specs.reading.file import read_spec
    from kdcore_cli.progress import progress_on

    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other", "give one of them")
    assignments = [*(sets or []), *([f"run={json.dumps(str(out))}"] if out else [])]
    found = registry.installed()
    asked = read_spec(file, assignments, registry=found)
    if not isinstance(asked, JOBS[job].spec):
        raise UserError(f"{file} is no {job} spec", f"write job: {job} in it")
    console.warn_of_problems(found)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill can be resumed too
    try:
        quieten(quiet, verbose)
        run = library.run(
            asked,
            registry=found,
            overwrite=overwrite,
            resume=resume,
            progress=progress_on(console.err(), quiet),
        )
        _part_from_other_processes()
        return run
    except KeyboardInterrupt:
        words = ["kdcore", job, str(file), *as_words(sets)]
        words += ["--out", str(out)] if out else []
        raise Interrupted(f"go on with: {shlex.join([*words, '--resume'])}") from None


def _part_from_other_processes() -> None:
    """End together what `torch.distributed` began; a process that just leaves may be aborted."""
    torch = sys.modules.get("torch")  # which is heavy, and not every job needs it
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
