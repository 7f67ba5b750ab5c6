"""The run folder: the spec, versions and results of a run.

The folder contains:

    spec.yaml          the resolved spec
    run.json           status, versions, plugins and models
    metrics.jsonl      one line per logged step
    data/              generated responses that the run learned from
    hidden_states/     stored hidden states of the target, for training a drafter
    rows/              encoded rows of a stream
    checkpoint-N/      resumable state
    before.json        figures before the training, if measured
    best.safetensors   the best drafter so far
    model/             the final student (plain transformers)
    adapter/           the student's adapters alone, if it has them
    drafter/           the final drafter
    results.json       figures before and after the training, and samples
    heldout_rows.json  the same figures by held-out row, for comparing runs
    token_gates.json   gate weights of the tokens of a few held-out responses
    replay.json        one prompt decoded with the drafter, round by round
    cost.json          cost of a comparison's cell
    cells/             runs of a comparison
    comparison.json    results of a comparison
    measurements.jsonl  measurements of a benchmark, batch by batch
    bench.json         results of a benchmark
    responses.jsonl    responses of a generate-data job
    report.html        page of `kdcore report`
    fault.json         why the first of several processes failed
    README.md          the model card
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.runs import interruption
from kdcore.runs.facts import RUN_FACTS, RunFacts, date_in, shown_versions
from kdcore.runs.recognition import is_damaged, is_run, newest_checkpoint, refuse_no_run
from kdcore.runs.record_files import Record, RecordFile, differences
from kdcore.runs.today import pinned, today
from kdcore.runs.whole_files import PART, refuse_unwritable, remove, unwritable, write_text
from kdcore.specs.parts.fields import SpecModel
from kdcore.specs.reading import plain_yaml

Ended = Literal["done", "failed", "interrupted"]
"""The final statuses of a run; until then the status in run.json is ``running``."""
CELLS = "cells"
"""The folder of a comparison's runs, inside its run folder."""
RESULTS = ("results.json", "comparison.json", "bench.json")
"""The results files; a job writes one of them."""
FAULT = "fault.json"
_UNBORN = ("lock", f"run.json{PART}")  # the files of a run that was killed before it started
_FIRST = (*_UNBORN, "run.json", "spec.yaml", f"spec.yaml{PART}", FAULT)  # before any work
_OPENING = 30.0  # seconds in which other processes have opened a folder that they share


class Run:
    """A run folder, which this process locks while the run is open.

    Args:
        folder: The folder.
        planned: Whether the folder need not hold a run yet.
        writes: Whether this process writes to the folder: only the main one of several does.

    Raises:
        UserError: The folder does not hold a run, and ``planned`` is False.
    """

    def __init__(self, folder: Path | str, *, planned: bool = False, writes: bool = True) -> None:
        if not planned:
            refuse_no_run(Path(folder))
        self.folder = Path(os.path.realpath(folder))
        self.writes = writes
        self._held = FileLock(self.folder / "lock", timeout=0)

    @classmethod
    def open(
        cls,
        folder: Path,
        spec: SpecModel,
        registry: Registry,
        *,
        overwrite: bool = False,
        resume: bool = False,
        writes: bool = True,
        shared: bool = False,
    ) -> Run:
        """Create a run folder and lock it, or open an existing one again.

        Args:
            folder: The folder.
            spec: The spec of the run.
            registry: The components and plugins, whose versions are recorded.
            overwrite: Whether an existing run is removed first.
            resume: Whether an existing run is continued.
            writes: Whether this process writes to the folder.
            shared: Whether other processes write to it too, so that it is locked only here.

        Returns:
            The open run.

        Raises:
            UserError: `refuse_foreign` refuses it, another process writes it, it holds a run and
                neither ``overwrite`` nor ``resume`` is set, or that run has a different spec.
        """
        run = cls(folder, planned=True, writes=writes)
        if not writes:
            return run
        run.refuse_foreign()  # before the lock, so that a foreign folder stays untouched
        with run._locked(_OPENING if shared else 0.0):
            used = run.refuse_foreign()  # again, now that no other process changes the folder
            used = used and not run.is_barren()
            if used and not (overwrite or resume):
                raise UserError(
                    f"{folder} already contains a run",
                    "continue it with resume=True, replace it with overwrite=True, or choose "
                    "another folder with run=FOLDER",
                )
            written = used and resume and run.path("spec.yaml").exists()
            if written and (changed := run.changed_from(spec, registry)):
                raise UserError(
                    f"{folder} was started with a different spec; changed: {', '.join(changed)}",
                    "resume with the same spec, or choose another run folder (run=FOLDER)",
                )
            if not (used and resume):
                run._empty()
            with run._closing():
                run.update(
                    status="running",
                    started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    date=date_in(run.folder, *run.folder.parents) or str(today().date()),
                    versions=shown_versions(),
                    plugins={p.label: f"{p.distribution}=={p.version}" for p in registry.plugins},
                )
                run.write_text("spec.yaml", plain_yaml.dump(spec.model_dump(mode="json")))
            if shared:
                run._held.release()
        return run

    def refuse_foreign(self) -> bool:
        """Check that the folder can hold a run, and whether it holds one already.

        A folder inside another run, which ``overwrite`` would delete, is refused but for cells.

        Returns:
            Whether the folder holds a run.

        Raises:
            UserError: The folder is a file, has other content, lies inside another run, or cannot
                be written.
        """
        cure = "choose another run folder (run=FOLDER)"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file", cure)
        outer = next(filter(is_run, self.folder.parents), None)
        if outer and self.folder.relative_to(outer).parts[0] != CELLS:
            raise UserError(f"{self.folder} lies inside another run, {outer}", cure)
        used = self.folder.exists() and any(p.name not in _UNBORN for p in self.folder.iterdir())
        if used and not is_run(self.folder):
            if is_damaged(self.folder):
                raise UserError(
                    f"{self.folder / 'run.json'} is damaged, so its run cannot be resumed or "
                    "replaced",
                    f"restore that file, delete the folder, or {cure}",
                )
            raise UserError(f"{self.folder} already exists and is not a run folder", cure)
        refuse_unwritable(self.folder, cure)
        return used

    def spec(self) -> Any:
        """Read the resolved spec as plain data.

        Raises:
            UserError: The run was killed before it wrote its spec, or the file was removed.
        """
        path = self.path("spec.yaml")
        if not path.exists():
            raise UserError(f"{path} is missing", "run its spec again with overwrite=True")
        return plain_yaml.parse(path.read_text("utf-8"), lambda line: f"{path}:{line}")[0]

    def changed_from(self, spec: SpecModel, registry: Registry) -> list[str]:
        """Compare the original spec, with defaults for newer fields, with the present one.

        ``evaluation.before`` may change until the run has finished, and the number of positions
        whose logits are computed at once always: it does not affect the result.

        Args:
            spec: The present spec.
            registry: The components that it may name.

        Returns:
            The fields that differ and may not.
        """
        before: set[str] = set() if self.finished else {"evaluation.before"}
        begun = self.spec()
        with suppress(ValidationError):  # else it is compared as it is written
            read = type(spec).model_validate(begun, context={"registry": registry})
            begun = read.model_dump(mode="json")
        changed = differences(begun, spec.model_dump(mode="json"))
        return sorted(changed - {"run", "chunk", "training.chunk"} - before)

    def path(self, *parts: str) -> Path:
        """Join a path inside the folder.

        Args:
            *parts: Names of folders and the file.

        Returns:
            The resolved path.

        Raises:
            UserError: The path leads out of the folder.
        """
        path = Path(os.path.realpath(self.folder.joinpath(*parts)))
        if not path.is_relative_to(self.folder):
            raise UserError(
                f"the path {'/'.join(parts)} leads out of the run folder",
                "use a path inside the run folder",
            )
        return path

    def write_text(self, name: str, text: str | Iterable[str]) -> None:
        """Write a text, or its parts, in one step, so that a kill never leaves half of a file."""
        if self.writes:
            self.path(name).parent.mkdir(exist_ok=True)
            write_text(self.path(name), text)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the folder; {} if it does not exist yet."""
        path = self.path(name)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def read(self, file: RecordFile[Record]) -> Record | None:
        """Read the record of a JSON file of the folder.

        Args:
            file: The file and its record.

        Returns:
            The record, or None if the file does not exist.

        Raises:
            UserError: The file does not hold such a record.
        """
        path = self.path(file.name)
        return file.read(path) if path.exists() else None

    def write(self, file: RecordFile[Record], record: Record) -> None:
        """Write a record to its JSON file of the folder, in one step."""
        self.write_text(file.name, file.text(record))

    @property
    def facts(self) -> RunFacts:
        """The record of run.json, with defaults if the file does not exist."""
        return self.read(RUN_FACTS) or RunFacts()

    def update(self, **facts: Any) -> None:
        """Set fields of the `RunFacts` in run.json."""
        self.write(RUN_FACTS, replace(self.facts, **facts))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        with self.path("metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def forget_after(self, step: int) -> None:
        """Remove the metrics of later steps from the log: a resumed run repeats these steps."""
        path = self.path("metrics.jsonl")
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            self.write_text("metrics.jsonl", "".join(line + "\n" for line in lines))

    def checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return newest_checkpoint(self.folder)

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json, comparison.json or bench.json; {} until it exists.

        A training has ``before`` and ``after``: figure -> value on the held-out rows.
        """
        return next(filter(None, map(self.read_json, RESULTS)), {})

    @property
    def status(self) -> str:
        """The status: ``not begun``, ``running``, ``done``, ``failed`` or ``interrupted``."""
        return str(self.read_json("run.json").get("status", "not begun"))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    @property
    def finished(self) -> bool:
        """Whether the student or the drafter is trained, measured and saved."""
        return (self.folder / "README.md").exists()

    def is_barren(self) -> bool:
        """Whether a run ended before any work, by a mistake, e.g.: another may take its folder."""
        ended = self.status not in ("done", "running")  # of a running one, other shares may begin
        return ended and all(item.name in _FIRST for item in self.folder.iterdir())

    @contextmanager
    def closed_after(self, tell: Callable[[Ended], None] = lambda status: None) -> Iterator[None]:
        """Run the block on the run's date, record and ``tell`` the final status, and unlock."""
        with self._closing(tell), pinned(self.facts.date or ""):
            yield

    @contextmanager
    def _closing(self, tell: Callable[[Ended], None] | None = None) -> Iterator[None]:
        """Record and ``tell`` the final status and unlock, without ``tell`` only after a fault."""
        status: Ended = "failed"
        try:
            yield
            status = "done"
        except BaseException as fault:
            # a library may have turned the interruption into another error
            if isinstance(fault, KeyboardInterrupt) or interruption.was_interrupted():
                status = "interrupted"
            elif tell is not None and not isinstance(fault, UserError) and not is_run(self.folder):
                cause = f"{self.folder} was removed or replaced while the run wrote it"
                raise UserError(cause, "start the run again, and leave its folder alone") from fault
            raise
        finally:
            if tell is not None or status != "done":
                with interruption.undisturbed():
                    try:
                        if self.path("run.json").exists():  # else the folder holds no run yet
                            self.update(status=status, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
                        if tell is not None:
                            tell(status)
                    finally:
                        self._held.release()

    def _empty(self) -> None:
        """Remove everything but the lock: the mark of a finished run first, run.json last.

        A kill in between leaves a run that can be overwritten again, and no checkpoint remains
        without the spec that keeps another run from resuming it.
        """
        order = {"README.md": -1, "before.json": 1, "spec.yaml": 1, "run.json": 2}
        for item in sorted(self.folder.iterdir(), key=lambda item: order.get(item.name, 0)):
            if item.name != "lock":
                remove(item)

    @contextmanager
    def _locked(self, patience: float = 0.0) -> Iterator[None]:
        """Lock the folder; the lock stays after the block unless the block raises.

        The system releases the lock when the process ends. ``patience``: seconds to wait for it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.acquire(timeout=patience)
        except Timeout:
            raise UserError(
                f"another process is writing {self.folder}",
                "wait until it ends, or choose another run folder (run=FOLDER)",
            ) from None
        except OSError as fault:
            cure = "choose another run folder (run=FOLDER)"
            raise unwritable(self.folder, fault, cure) from fault
        try:
            yield
        except BaseException:
            self._held.release()
            raise


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line that a kill truncated
        return 2**62
