"""The run of a training job: lock the run folder, call the plugins' hooks, do the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from transformers import PrinterCallback

from kdcore.components.registry import Registry
from kdcore.data.ranks import Ranks
from kdcore.models.device import CPU, device_count
from kdcore.runs import interruption
from kdcore.runs.folder import FAULT, Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import FIRST_MEASUREMENT, HeldOutResults
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import processes
from kdcore.training.trainer.figures import STOPPING, IdleGates, StopWithCheckpoint
from kdcore.training.trainer.trainer import DistillationTrainer


def training_run(
    spec: TrainedSpec,
    work: Callable[[RunHooks], None],
    registry: Registry,
    *,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
) -> Run:
    """Do the work of a spec in its run folder, unless the run is finished.

    Of several processes only the main one writes, reports and calls the plugins' hooks.

    Args:
        spec: The spec of the run.
        work: The function that does the work, given the run's hooks.
        registry: The components and plugins.
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished run is continued.
        progress: The display of stages and notes, or None.

    Returns:
        The run.

    Raises:
        UserError: `kdcore.runs.folder.Run.open` refuses the folder, or ``work`` raises it, in this
            or another process.
    """
    place = processes(spec)
    main, ranks = place.is_main_process, Ranks(place)
    run = Run(spec.run, planned=True, writes=main)

    def open_run() -> None:
        nonlocal run
        run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
        run.path(FAULT).unlink(missing_ok=True)

    ranks.by_main(open_run)  # the others wait until the folder is there
    progress = progress if progress and main else Silent()
    hooks = RunHooks(registry, run, progress)
    with ranks.ending_together(run.folder / FAULT):
        with run.closed_after(lambda status: hooks.tell("kdcore_run_ended", status=status)):
            hooks.tell("kdcore_run_started")
            if place.num_processes == 1 and place.device != CPU and device_count() > 1:
                progress.note(
                    f"{device_count()} devices are visible and one is used; for all of them: "
                    f"accelerate launch --num_processes {device_count()} -m kdcore_cli {spec.job} "
                    "SPEC"
                )
            if run.finished:
                progress.note(f"{spec.run} is already finished")
            else:
                work(hooks)
        place.wait_for_everyone()  # until the main process has closed the run
    return run


def train_to_the_end(trainer: DistillationTrainer, run: Run, progress: Progress) -> None:
    """Train from the newest checkpoint, or from the start, to the last step.

    The first Ctrl-C or SIGTERM stops a training of one process after its step, with a checkpoint.

    Args:
        trainer: The Trainer; its ``step_done`` is set to report to ``progress``.
        run: The run, whose log loses the steps after the checkpoint.
        progress: The display of the steps.
    """
    checkpoint = run.checkpoint()
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    run.forget_after(done)
    trainer.remove_callback(PrinterCallback)
    with progress.stage("train", trainer.planned_steps(), done) as stage:
        gates = IdleGates(progress.note)

        def step_done(step: int, figures: Mapping[str, float]) -> None:
            stage.advance(loss=figures["loss"])
            gates.add(figures)

        trainer.step_done = step_done
        # several processes could stop at different steps, and then wait for each other
        alone = trainer.accelerator.num_processes == 1
        with ExitStack() as signals:
            if alone:
                asked = signals.enter_context(interruption.deferred(progress.note, STOPPING))
                trainer.add_callback(StopWithCheckpoint(asked))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if alone and asked():
                raise KeyboardInterrupt
        gates.close()


def measured_before(
    run: Run, spec: TrainedSpec, measure: Callable[[], HeldOutResults]
) -> HeldOutResults:
    """Measure before the training, once, and write ``before.json``.

    The file is written even without a measurement: it marks the run as started, see
    `kdcore.runs.inputs`.

    Args:
        run: The run.
        spec: The spec of the run.
        measure: The function that measures.

    Returns:
        The results, of an earlier attempt if there was one; empty without ``evaluation.before``.
    """
    found = run.read(FIRST_MEASUREMENT) or HeldOutResults()
    if not spec.evaluation.before:
        found = HeldOutResults()
    elif not found.figures:
        found = measure()
    run.write(FIRST_MEASUREMENT, found)
    return found
