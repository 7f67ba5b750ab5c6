"""A cell of a comparison, in a process of its own that ends when the comparison does."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from kdcore.errors import UserError
from kdcore.method.choice import choices
from kdcore.method.registry import Registry, describe, installed
from kdcore.runs.costs import spent
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.runs.progress import Silent
from kdcore.runs.results import (
    CELL_COST,
    TRAINING_RESULTS,
    TrainingResults,
)
from kdcore.specs.compare import CellSpec, plain

PATIENCE = 60.0
"""Seconds that a cell has to close its run, after which it is killed."""


def run_cell(spec: CellSpec, registry: Registry, note: Callable[[str], None]) -> str | None:
    """Carry out a cell's spec; the reason when that failed.

    note: is told each line that the cell has to say.
    Raises OtherInput when the cell would read something else than those before it did. A cell that
    is under way when this is interrupted has ended when this returns.
    """
    processes = _processes(spec, registry)
    receive, send = processes.Pipe(duplex=False)
    asked = plain(spec)
    process: Any = processes.Process(target=_in_process, args=(asked, send))
    reason: str | None = None
    try:
        process.start()
        send.close()
        for kind, cause, cure in _told(receive, process):
            if kind == "other input":
                raise OtherInput(cause, cure)
            if kind == "note":
                note(cause)
            else:
                reason = cause
        process.join()
    finally:
        _end(process)
    if reason is None and process.exitcode:
        return f"its process ended with code {process.exitcode}"
    return reason


def logged(folder: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _processes(spec: CellSpec, registry: Registry) -> Any:
    """How processes are begun: where it can be, from one that has imported the libraries already.

    That is most of what a run of seconds costs. It imports only, so that nothing is shared. What
    it imports is settled by the first cell: the job, what builds the components, and what judges
    its answers.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    processes = multiprocessing.get_context("forkserver")
    modules = [registry.job(spec.job).work.partition(":")[0]]
    for _, choice in choices(spec):
        component = registry.component(choice.kind, choice.name)
        with suppress(UserError):  # one that cannot be imported is for the cell to tell of
            registry.attribute(component)
            modules.append(component.place.partition(":")[0])
    if "rouge_l" in getattr(getattr(spec, "evaluation", None), "answers", ()):
        modules.append("rouge_score.rouge_scorer")
    processes.set_forkserver_preload(list(dict.fromkeys(modules)))
    _begin_server()
    return processes


def _begin_server() -> None:
    """Begin what forks the cells. Ctrl-C, which every process of a terminal gets, passes it by.

    It would ignore Ctrl-C by itself, but not before it has imported the libraries.
    """
    resource_tracker.ensure_running()  # here, for it lets go of the signals that are held back
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # and stays so over there
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _told(receive: Any, process: Any) -> Iterator[tuple[str, str, str]]:
    """What the process says, to its end."""
    while True:
        wait([receive, process.sentinel])
        if not receive.poll():  # it has ended, and all that it said is read
            return
        try:
            yield receive.recv()
        except EOFError:
            return


def _end(process: Any) -> None:
    """Politely at first, so that the run's folder says that it was interrupted."""
    if process.pid is None or not process.is_alive():
        return
    process.terminate()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def _in_process(asked: dict[str, Any], send: Any) -> None:
    try:
        _end_with_parent()
        carry_out_cell(asked, send)
    except KeyboardInterrupt:  # the parent says so
        sys.exit(130)


def _end_with_parent() -> None:
    """Be interrupted by the parent, or by its end, that of a kill included. Ctrl-C is for it."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # closing the run is not interrupted
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class _Telling(Silent):
    """Passes the notes on."""

    def __init__(self, send: Any) -> None:
        self._send = send

    def note(self, line: str) -> None:
        """See `Progress.note`."""
        self._send.send(("note", line, ""))


def carry_out_cell(asked: dict[str, Any], send: Any) -> None:
    """The run, then what it cost; ``send`` takes what there is to tell."""
    try:
        registry = installed()
        job = registry.job(asked["job"])
        spec: Any = job.spec.model_validate(asked)
        done = _is_done(Run(spec.run))  # by a process killed before it said its cost
        run: Run = job.carry_out(
            spec, registry=registry, overwrite=False, resume=True, progress=_Telling(send)
        )
        cost = spent(logged(run.folder))
        run.write(CELL_COST, cost if done else replace(cost, peak_memory=_peak_memory()))
    except OtherInput as wrong:
        send.send(("other input", wrong.cause, wrong.cure))
    except UserError as wrong:
        send.send(("failed", wrong.cause, wrong.cure))
    except Exception as fault:
        send.send(("failed", describe(fault), ""))


def _is_done(run: Run) -> bool:
    """Whether a run of any job, with a model card or without one, has come to its end."""
    return run.finished or run.status == "done"


def _peak_memory() -> float:
    """Bytes of this process, at its highest."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm with one seed, at one point of the grid. trial: it only helps to choose the point."""

    arm: str
    seed: int
    point: int
    spec: CellSpec
    trial: bool = False

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.arm}, {f'point {self.point}, ' if self.trial else ''}seed {self.seed}"

    @property
    def run(self) -> Run:
        """Its folder."""
        return Run(self.spec.run)

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        return _is_done(self.run) and self.run.path(CELL_COST.name).exists()

    def results(self) -> TrainingResults:
        """Its ``results.json``; without figures of one that failed."""
        return (self.run.read(TRAINING_RESULTS) if self.done else None) or TrainingResults()
