"""How every job that trains is carried out: hold the run folder, tell the plugins, do the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kdcore.jobs import TrainedSpec
from kdcore.progress import Progress, Silent
from kdcore.registry import Registry
from kdcore.run_hooks import RunHooks
from kdcore.runs import Run
from kdcore.training_arguments import processes


def carry_out(
    spec: TrainedSpec,
    work: Callable[[RunHooks], None],
    registry: Registry,
    *,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
) -> Run:
    """Do the work of a spec in its run folder, unless it is done already.

    work: is given the run, its progress and its hooks as one.

    Of several processes the main one alone writes and reports.
    Raises UserError as `kdcore.runs.Run.open` does, and whatever the work raises.
    """
    place = processes(spec)
    main = place.is_main_process
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume, writes=main)
    place.wait_for_everyone()  # until the folder is there
    progress = progress if progress and main else Silent()
    hooks = RunHooks(registry, run, progress)
    status: Literal["done", "failed", "interrupted"] = "failed"
    try:
        hooks.tell("kdcore_run_started")
        if run.finished:
            progress.note(f"{spec.run} is done already")
        else:
            work(hooks)
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.close(status)
        hooks.tell("kdcore_run_ended", status=status)
    return run
