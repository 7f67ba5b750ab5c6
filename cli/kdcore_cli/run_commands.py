"""The commands that carry out a spec: one for each job of the registry's table.

typer reads the annotations, so they are not postponed here.
"""

import inspect
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcore.errors import UserError
from kdcore.method import registry
from kdcore.method.job import Job
from kdcore_cli import console
from kdcore_cli.evaluate_command import evaluate
from kdcore_cli.interruption import Interrupted
from kdcore_cli.options import (
    AsJson,
    Device,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Sets,
    SpecFile,
    Verbose,
    as_words,
)
from kdcore_cli.outcomes import outcome_of
from kdcore_cli.quiet_libraries import quieten

_OWN_COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate}
"""Of jobs whose command takes something else than a spec, too."""
_OF_A_FOLDER = ("out", "overwrite", "resume")
_OF_ONE_DEVICE = ("bench",)
"""Jobs whose spec names a device; training runs where its launcher says."""


def help_of(job: Job) -> str:
    """What ``kdcore NAME --help`` says above the options."""
    about = job.about or f"For example:\n\nkdcore {job.name} spec.yaml"
    return f"{job.summary}\n\n{about}"


def command_of(job: Job) -> Callable[..., None]:
    """The function that typer makes a job's command of.

    Its options are those of `_carried_out`, without those of a run folder where the job has none,
    and those of what shows the outcome.
    """
    if job.name in _OWN_COMMANDS:
        return _OWN_COMMANDS[job.name]
    show = outcome_of(job) if job.run_folder else _show_plainly
    _, *asked = _parameters(_carried_out)
    _, as_json, *own = _parameters(show)
    kept = [p for p in asked if job.run_folder or p.name not in _OF_A_FOLDER]
    if job.name not in _OF_ONE_DEVICE:
        kept = [p for p in kept if p.name != "device"]

    def command(**given: Any) -> None:
        shown = {p.name: given.pop(p.name) for p in (as_json, *own)}
        outcome = _carried_out(job, **given)
        if not job.run_folder or outcome.writes:  # of several processes, one speaks
            show(outcome, **shown)

    option = as_json.replace(annotation=AsJson, default=False)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in (*kept, *own, option)]
    )
    return command


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _show_plainly(outcome: Any, as_json: bool) -> None:
    """What a job without a run folder found."""
    from kdcore_cli.tables import show_facts

    if as_json:
        console.print_json(outcome)
    else:
        show_facts(console.out(), outcome)


def _carried_out(
    job: Job,
    spec: SpecFile,
    sets: Sets = None,
    out: Out = None,
    device: Device = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Any:
    """Read a spec and do what it says."""
    from kdcore import library
    from kdcore.specs.reading.file import read_spec
    from kdcore_cli.progress import progress_on

    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other", "give one of them")
    assignments = [
        *(sets or []),
        *([f"run={json.dumps(str(out))}"] if out else []),
        *([f"device={json.dumps(device)}"] if device else []),
    ]
    found = registry.installed()
    asked: Any = read_spec(spec, assignments, registry=found)
    if asked.job != job.name:
        raise UserError(f"{spec} is no {job.name} spec", f"write job: {job.name} in it")
    console.warn_of_problems(found)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill can be resumed too
    try:
        quieten(quiet, verbose)
        progress = progress_on(console.err(), quiet)
        if job.run_folder:
            outcome: Any = library.run(
                asked, registry=found, overwrite=overwrite, resume=resume, progress=progress
            )
        else:
            outcome = job.carry_out(asked, registry=found, progress=progress)
        _part_from_other_processes()
        return outcome
    except KeyboardInterrupt:
        if not job.run_folder:
            raise
        raise Interrupted(f"go on with: {_resuming(job, spec, sets, out, device)}") from None


def _resuming(
    job: Job, spec: Path, sets: list[str] | None, out: Path | None, device: str | None
) -> str:
    """The command that goes on with a run."""
    words = ["kdcore", job.name, str(spec), *as_words(sets)]
    words += ["--out", str(out)] if out else []
    words += ["--device", device] if device else []
    return shlex.join([*words, "--resume"])


def _part_from_other_processes() -> None:
    """End together what `torch.distributed` began; a process that just leaves may be aborted."""
    torch = sys.modules.get("torch")  # which is heavy, and not every job needs it
    if torch is not None and torch.distributed.is_initialized():
        met = torch.distributed.barrier(async_op=True)
        met.wait()
        # Held until gloo's threads have ended: one that dropped it last would wait for the GIL,
        # which the group's destructor keeps while it joins them.
        torch.distributed.destroy_process_group()
        del met
