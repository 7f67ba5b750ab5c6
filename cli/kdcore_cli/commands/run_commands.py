"""Commands that run a spec: one for each job of the registry.

typer reads the annotations, so this module does not postpone them.
"""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

from kdcore.components import registry
from kdcore.components.job import Job
from kdcore.errors import UserError
from kdcore.runs import interruption
from kdcore_cli.commands.evaluate_command import evaluate
from kdcore_cli.interruption import InterruptedRun
from kdcore_cli.options import (
    AsJson,
    Device,
    On,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Sets,
    Share,
    SpecFile,
    Verbose,
    share_of,
)
from kdcore_cli.terminal import console
from kdcore_cli.terminal.outcomes import outcome_of, refuse_unknown_metric
from kdcore_cli.terminal.quiet_libraries import quieten

_OWN_COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate}
"""Commands of the jobs that also accept other arguments than a spec."""
_OF_A_FOLDER = ("out", "overwrite", "resume")
_OF_ONE_DEVICE = ("bench",)
"""Jobs whose spec names a device; training runs where its launcher says."""


def help_of(job: Job) -> str:
    """Return the help text of a job's command, above its options.

    Args:
        job: Declared job.

    Returns:
        The summary and the further paragraphs.
    """
    about = job.about or f"For example:\n\nkdcore {job.name} spec.yaml"
    return f"{job.summary}\n\n{about}"


def command_of(job: Job) -> Callable[..., None]:
    """Return the function that typer turns into a job's command.

    Its options are those of `_carried_out` (without those of a run folder if the job has none) and
    those of the function that prints the results.

    Args:
        job: Declared job.

    Returns:
        A function whose signature lists the options.
    """
    if job.name in _OWN_COMMANDS:
        return _OWN_COMMANDS[job.name]
    show = outcome_of(job) if job.run_folder else _show_plainly
    _, *asked, _ = _parameters(_carried_out)
    _, as_json, *own = _parameters(show)
    kept = [p for p in asked if job.run_folder or p.name not in _OF_A_FOLDER]
    if job.name not in _OF_ONE_DEVICE:
        kept = [p for p in kept if p.name != "device"]
    if not job.spreads:
        kept = [p for p in kept if p.name != "on"]
    if not job.shares:
        kept = [p for p in kept if p.name != "share"]

    def command(**given: Any) -> None:
        shown = {p.name: given.pop(p.name) for p in (as_json, *own)}
        outcome = _carried_out(job, shown=shown, **given)
        if not job.run_folder or outcome.writes:  # of several processes, one prints
            show(outcome, **shown)

    option = as_json.replace(annotation=AsJson, default=False)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in (*kept, *own, option)]
    )
    return command


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _show_plainly(outcome: Any, as_json: bool) -> None:
    """Print the result of a job without a run folder."""
    from kdcore_cli.terminal.tables import show_facts

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
    on: On = None,
    share: Share = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    *,
    shown: dict[str, Any],
) -> Any:
    """Read a spec and run its job; ``shown``: the options of its output."""
    from kdcore import library
    from kdcore.specs.reading.file import placing, read_spec
    from kdcore_cli.terminal.progress import progress_on

    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other", "remove one of them")
    asked_share = share_of(share)
    assignments = [
        *(sets or []),
        *([f"run={json.dumps(str(out))}"] if out else []),
        *([f"device={json.dumps(device)}"] if device else []),
    ]
    found = registry.installed()
    asked: Any = read_spec(spec, assignments, registry=found)
    if asked.job != job.name:
        raise UserError(
            f"{spec} is a spec of the job {asked.job}, not {job.name}",
            f"run it with: kdcore {asked.job} {spec}",
        )
    if "metric" in shown:
        refuse_unknown_metric(asked, shown["metric"])
    console.warn_of_problems(found)
    try:
        quieten(quiet, verbose)
        progress = progress_on(console.err(), quiet)
        with placing(spec, assignments):
            if job.run_folder:
                outcome: Any = library.run(
                    asked,
                    registry=found,
                    overwrite=overwrite,
                    resume=resume,
                    progress=progress,
                    on=on,
                    share=asked_share,
                )
            else:
                outcome = job.carry_out(asked, registry=found, progress=progress)
        _part_from_other_processes()
        return outcome
    except BaseException as fault:
        # a library may have turned the interruption into another error
        stopped = isinstance(fault, KeyboardInterrupt) or interruption.was_interrupted()
        if not stopped or not job.run_folder:
            raise
        raise InterruptedRun from None


def _part_from_other_processes() -> None:
    """Close `torch.distributed` in all processes together; one that just exits may be aborted."""
    torch = sys.modules.get("torch")  # slow to import, and not every job uses it
    if torch is not None and torch.distributed.is_initialized():
        met = torch.distributed.barrier(async_op=True)
        met.wait()
        # Held until gloo's threads have ended: one that dropped it last would wait for the GIL,
        # which the group's destructor keeps while it joins them.
        torch.distributed.destroy_process_group()
        del met
