"""One cell of a comparison, run in its own process, which ends when the comparison ends."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any, TypeAlias

from transformers.utils.logging import disable_progress_bar

from kdcore.components.choice import choices
from kdcore.components.registry import Registry, describe, installed
from kdcore.errors import Mistakes, UserError
from kdcore.jobs.comparison.cells import Cell, is_done, logged
from kdcore.jobs.ray_workers import spread
from kdcore.runs import interruption
from kdcore.runs.costs import spent
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.runs.progress import Silent
from kdcore.runs.results import CELL_COST
from kdcore.specs.comparable import CellSpec
from kdcore.specs.parts.changes import plain


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a cell failed.

    Attributes:
        error: The mistake.
        traceback: Where its process raised it; empty if the process was ended.
    """

    error: UserError
    traceback: str = ""


Message: TypeAlias = str | Failed
"""What a cell tells: a note, or why it failed."""

PATIENCE = 60.0
"""Seconds that a terminated cell has to close its run before it is killed."""


def run_cell(spec: CellSpec, registry: Registry, note: Callable[[str], None]) -> Failed | None:
    """Run a cell's spec in a process of its own; on an interrupt, end that process first.

    Args:
        spec: The cell's spec.
        registry: The installed components.
        note: Called with each line that the cell notes.

    Returns:
        The reason of the failure, or None when the cell succeeded.

    Raises:
        OtherInput: A model or row file changed since earlier cells read it.
    """
    processes = _processes(spec, registry)
    receive, send = processes.Pipe(duplex=False)
    asked = plain(spec)
    process: Any = processes.Process(target=_in_process, args=(asked, dict(os.environ), send))
    try:
        with _without_main():
            process.start()
        send.close()
        reason = _reason(_told(receive, process), note)
        process.join()
    finally:
        _end(process)
    if reason is None and process.exitcode:
        wrong = UserError(
            f"the process exited with code {process.exitcode}",
            "rerun with resume=True; if the system ended it for its memory, lower training.chunk "
            "before that",
        )
        return Failed(wrong)
    return reason


Outcomes: TypeAlias = Iterator[tuple[Cell, Failed | None]]
"""A cell that ended, and the reason of its failure, or None when it succeeded."""


def run_here(
    cells: Sequence[Cell], registry: Registry, note: Callable[[Cell, str], None]
) -> Outcomes:
    """Run cells one after another; see `run_cell`.

    Args:
        cells: The cells.
        registry: The installed components.
        note: Called with each line that a cell notes.

    Yields:
        The outcomes in order.
    """
    for cell in cells:
        yield cell, run_cell(cell.spec, registry, partial(note, cell))


def run_on_ray(cells: Sequence[Cell], run: Run, note: Callable[[Cell, str], None]) -> Outcomes:
    """Run cells that do not depend on each other, each in a worker of its own.

    A cell whose worker died is resumed at its last checkpoint.

    Args:
        cells: The cells.
        run: The run of the comparison, whose folder all machines must share.
        note: Called with each line that a cell notes, when the cell ends.

    Yields:
        The outcomes in any order.

    Raises:
        OtherInput: See `run_cell`.
        UserError: See `kdcore.jobs.ray_workers.spread`.
    """
    shares = [plain(cell.spec) for cell in cells]

    def died(place: int, line: str) -> None:
        note(cells[place], line)

    seen = run.path("spec.yaml")
    for place, told in spread(told_by_cell, shares, fresh=True, seen=seen, died=died):
        cell = cells[place]
        messages = [Failed(told)] if isinstance(told, UserError) else told
        yield cell, _reason(messages, partial(note, cell))


def told_by_cell(asked: dict[str, Any]) -> list[Message]:
    """Run a cell in this process, and return its messages.

    Args:
        asked: The cell's spec as plain data.

    Returns:
        The messages in order.
    """
    told: list[Message] = []
    carry_out_cell(asked, told.append)
    return told


def _reason(told: Iterable[Message], note: Callable[[str], None]) -> Failed | None:
    """The reason of a cell's failure, or None. Raises OtherInput."""
    reason: Failed | None = None
    for message in told:
        if isinstance(message, str):
            note(message)
        elif isinstance(message.error, OtherInput):
            raise message.error
        else:
            reason = message
    return reason


def _processes(spec: CellSpec, registry: Registry) -> Any:
    """The multiprocessing context: where possible, a server with the libraries already imported.

    Importing is most of the cost of a short run. The server only imports, so cells share no
    state. The first cell decides the imported modules: the job and the plugins of its components.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    processes = multiprocessing.get_context("forkserver")
    modules = [registry.job(spec.job).work.partition(":")[0]]
    if logging.root.manager.disable >= logging.WARNING:
        modules.insert(0, "kdcore.jobs.comparison.quiet_cells")
    for _, choice in choices(spec):
        component = registry.component(choice.kind, choice.name)
        with suppress(UserError):  # the cell itself reports a component that cannot be imported
            registry.attribute(component)
            modules.append(component.place.partition(":")[0])
    processes.set_forkserver_preload(list(dict.fromkeys(modules)))
    _begin_server()
    return processes


def _begin_server() -> None:
    """Start the fork server with SIGINT and SIGHUP blocked, so that a terminal does not end it.

    The server ignores SIGINT by itself, but only after it has imported the libraries.
    """
    resource_tracker.ensure_running()  # started first, because its start unblocks the signals
    blocked = {signal.SIGINT, signal.SIGHUP}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # the server inherits this
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the running program: a new process would run a script again, up to its comparison."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _told(receive: Any, process: Any) -> Iterator[Message]:
    """Yield the process's messages until it ends."""
    while True:
        wait([receive, process.sentinel])
        if not receive.poll():  # the process has ended, and all its messages are read
            return
        try:
            yield receive.recv()
        except EOFError:
            return


def _end(process: Any) -> None:
    """Terminate the process first, so that it records the interruption; then kill it."""
    if process.pid is None or not process.is_alive():
        return
    process.terminate()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def _in_process(asked: dict[str, Any], environment: dict[str, str], send: Any) -> None:
    try:
        gc.freeze()  # else each collection during training looks through the imported modules
        _end_with_parent()
        # The server that forked this process keeps the environment of the first comparison. What a
        # library read of it at import stays, here as in the parent.
        os.environ.clear()
        os.environ.update(environment)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # the comparison shows its own
        carry_out_cell(asked, send.send)
    except KeyboardInterrupt:  # the parent reports the interruption
        sys.exit(130)


def _end_with_parent() -> None:
    """Stop on SIGTERM or when the parent ends, even by a kill; leave the rest to the parent."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not stop the closing
        raise KeyboardInterrupt

    interruption.ignore_signals()
    signal.signal(signal.SIGTERM, stop)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class _Telling(Silent):
    """A progress display that tells the notes."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell

    def note(self, line: str) -> None:
        """See `Progress.note`."""
        self._tell(line)


def carry_out_cell(asked: dict[str, Any], tell: Callable[[Message], None]) -> None:
    """Run the job, then write its cost.

    Args:
        asked: The cell's spec as plain data.
        tell: Called with each message.
    """
    try:
        registry = installed()
        job = registry.job(asked["job"])
        spec: Any = job.spec.model_validate(asked)
        # a process that was killed after the end of its run may not have written the cost
        done = is_done(Run(spec.run, planned=True))
        run: Run = job.carry_out(
            spec, registry=registry, overwrite=False, resume=True, progress=_Telling(tell)
        )
        cost = spent(logged(run.folder))
        run.write(CELL_COST, cost if done else replace(cost, peak_memory=_peak_memory()))
    except UserError as wrong:
        known = isinstance(wrong, OtherInput | Mistakes)  # not a plugin's own, with other arguments
        plain_one = wrong if known else UserError(wrong.cause, wrong.cure, wrong.field)
        tell(Failed(plain_one, traceback.format_exc()))
    except Exception as fault:
        cause = f"internal error in {installed().whose(fault)}: {describe(fault)}"
        tell(Failed(UserError(cause, "report its traceback"), traceback.format_exc()))


def _peak_memory() -> float:
    """Peak resident memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
