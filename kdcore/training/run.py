"""The run of a job that trains: hold the run folder, tell the plugins, do the work."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PrinterCallback

from kdcore.method.registry import Registry
from kdcore.models.device import CPU, device_count
from kdcore.runs.folder import Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import FIRST_MEASUREMENT, HeldOutResults
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import processes
from kdcore.training.trainer import DistillationTrainer


def training_run(
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

    Of several processes the main one alone writes, reports, and tells the plugins.
    Raises UserError as `kdcore.runs.folder.Run.open` does, and whatever the work raises.
    """
    place = processes(spec)
    main = place.is_main_process
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume, writes=main)
    place.wait_for_everyone()  # until the folder is there
    progress = progress if progress and main else Silent()
    hooks = RunHooks(registry, run, progress)
    with run.closed_after(lambda status: hooks.tell("kdcore_run_ended", status=status)):
        hooks.tell("kdcore_run_started")
        if place.num_processes == 1 and place.device != CPU and device_count() > 1:
            progress.note(
                f"{device_count()} devices are visible and one is used; for all of them: "
                f"accelerate launch --num_processes {device_count()} -m kdcore_cli {spec.job} SPEC"
            )
        if run.finished:
            progress.note(f"{spec.run} is done already")
        else:
            work(hooks)
    return run


def train_to_the_end(trainer: DistillationTrainer, run: Run, progress: Progress) -> None:
    """Train from the newest checkpoint, or from the first step, to the last one.

    Args:
        trainer: The Trainer; its ``step_done`` reports to the progress from here on.
        run: The run folder, whose log forgets the steps after the checkpoint.
        progress: Where the steps are shown.
    """
    checkpoint = run.checkpoint()
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    run.forget_after(done)
    trainer.remove_callback(PrinterCallback)
    with progress.stage("train", trainer.planned_steps(), done) as stage:
        trainer.step_done = lambda step, figures: stage.advance(loss=figures["loss"])
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def measured_before(
    run: Run, spec: TrainedSpec, measure: Callable[[], HeldOutResults]
) -> HeldOutResults:
    """What ``measure`` gives, or gave an earlier attempt at the run; empty if not asked for.

    before.json is written in any case: a run that has it has begun to train, see
    `kdcore.runs.inputs`.
    """
    found = run.read(FIRST_MEASUREMENT) or HeldOutResults()
    if not spec.evaluation.before:
        found = HeldOutResults()
    elif not found.figures:
        found = measure()
    run.write(FIRST_MEASUREMENT, found)
    return found
