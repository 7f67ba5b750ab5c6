"""The run folder: what was asked, with which versions, what came out.

::

    spec.yaml          the resolved spec
    run.json           status, versions, plugins, what the models were
    metrics.jsonl      one line per logged step
    data/              generated responses, as they were learned from
    hidden_states/     the target's, if they are stored to train a drafter
    checkpoint-N/      resumable state
    before.json        the figures before the training, if it was measured
    best.safetensors   the best drafter so far
    model/             the final student (plain transformers)
    adapter/           its adapters alone, if it learned by them
    drafter/           the final drafter
    results.json       the figures before and after the training, and the samples
    heldout_rows.json  the same figures by held-out row, for comparing runs
    token_gates.json   what the gates give the tokens of a few held-out responses
    replay.json        one prompt decoded with the drafter, round by round
    cost.json          of a comparison's cell: what it took
    cells/             of a comparison: its runs
    comparison.json    of a comparison: what came out
    measurements.jsonl  of a benchmark: every batch
    bench.json         of a benchmark: what came out
    responses.jsonl    of the job that only generates: what comes out
    report.html        what `kdcore report` drew
    README.md          the model card
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.method.registry import Registry
from kdcore.runs.facts import RUN_FACTS, RunFacts
from kdcore.runs.record_files import Record, RecordFile
from kdcore.runs.whole_files import write_whole
from kdcore.specs.fields import SpecModel
from kdcore.specs.reading import plain_yaml

Ended = Literal["done", "failed", "interrupted"]
"""How a run ended; until then run.json says that it is running."""
CELLS = "cells"
"""Where a comparison keeps its own runs."""
RESULTS = ("results.json", "comparison.json", "bench.json")
"""What a job may leave of figures: one of them."""
SHOWN_VERSIONS = ("kdcore", "torch", "transformers", "accelerate", "peft", "safetensors", "pluggy")
_UNBORN = ("lock", "run.json.part")  # all that a kill can leave of a run not yet begun


class Run:
    """One run folder, held by this process alone until it is closed.

    writes: False in all but the main one of several processes; then nothing is written.
    """

    def __init__(self, folder: Path | str, *, writes: bool = True) -> None:
        self.folder = Path(folder).resolve()
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
    ) -> Run:
        """Create the folder, or take it up again.

        Raises UserError when the folder cannot be a run's (`refuse_foreign`) or cannot be written,
        when another process is writing it, when it holds a run and neither ``overwrite`` nor
        ``resume`` is set, or when the spec to resume differs from the one begun.
        """
        run = cls(folder, writes=writes)
        if not writes:
            return run
        run.refuse_foreign()  # where not even a lock is to be left
        with run._locked():
            used = run.refuse_foreign()  # again: now nobody else changes it
            if used and not (overwrite or resume):
                raise UserError(
                    f"{folder} already contains a run",
                    "resume=True goes on with it, overwrite=True starts again, run=FOLDER names "
                    "another",
                )
            if used and resume and run.path("spec.yaml").exists():
                run._refuse_other(spec, registry)
            if used and not resume:
                run._empty()
            run.update(
                status="running",
                started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                versions={"python": platform.python_version()}
                | {name: version(name) for name in SHOWN_VERSIONS},
                plugins={
                    plugin.label: f"{plugin.distribution}=={plugin.version}"
                    for plugin in registry.plugins
                },
            )
            run.write_text("spec.yaml", plain_yaml.dump(spec.model_dump(mode="json")))
        return run

    def refuse_foreign(self) -> bool:
        """Whether the folder holds a run.

        Raises UserError when it is a file, holds something else, or lies inside another run,
        which ``overwrite`` would then delete with it, and is none of a comparison's cells.
        """
        cure = "choose another run folder (run=FOLDER)"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file", cure)
        outer = next(filter(is_run, self.folder.parents), None)
        if outer and self.folder.relative_to(outer).parts[0] != CELLS:
            raise UserError(f"{self.folder} lies inside another run, {outer}", cure)
        used = self.folder.exists() and any(p.name not in _UNBORN for p in self.folder.iterdir())
        if used and not is_run(self.folder):
            raise UserError(f"{self.folder} exists and holds no run", cure)
        return used

    def spec(self) -> Any:
        """The resolved spec as plain data."""
        path = self.path("spec.yaml")
        return plain_yaml.parse(path.read_text("utf-8"), lambda line: f"{path}:{line}")[0]

    def _refuse_other(self, spec: SpecModel, registry: Registry) -> None:
        """Raises UserError when the run was begun with another spec.

        What is measured before the training can be, or be left out, until the run has ended.
        """
        free = {"run"} if self.finished else {"run", "evaluation.before"}
        asked = spec.model_dump(mode="json")
        changed = sorted(_differences(self._begun_with(spec, registry), asked) - free)
        if changed:
            raise UserError(
                f"{self.folder} was started with a different spec ({', '.join(changed)} differ)",
                "resume with the same spec, or choose another run folder (run=FOLDER)",
            )

    def _begun_with(self, spec: SpecModel, registry: Registry) -> Any:
        """The resolved spec; what it does not say, since the field is newer than it, by default.

        As it is written where it says what can no longer be said.
        """
        written = self.spec()
        try:
            read = type(spec).model_validate(written, context={"registry": registry})
        except ValidationError:
            return written
        return read.model_dump(mode="json")

    def path(self, *parts: str) -> Path:
        """A path inside the folder.

        Raises UserError when it would lead outside.
        """
        path = self.folder.joinpath(*parts).resolve()
        if not path.is_relative_to(self.folder):
            raise UserError(f"{'/'.join(parts)} leads out of the run folder", "use a plain name")
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole."""
        if not self.writes:
            return
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """A json file of the folder, {} when it is not there yet."""
        path = self.path(name)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def read(self, file: RecordFile[Record]) -> Record | None:
        """The record of a JSON file of the folder; None when the file does not exist.

        Raises:
            UserError: The file is not as kdcore writes it.
        """
        path = self.path(file.name)
        return file.read(path) if path.exists() else None

    def write(self, file: RecordFile[Record], record: Record) -> None:
        """Write a JSON file of the folder whole."""
        self.write_text(file.name, file.text(record))

    @property
    def facts(self) -> RunFacts:
        """run.json."""
        return self.read(RUN_FACTS) or RunFacts()

    def update(self, **facts: Any) -> None:
        """Set fields of `RunFacts` in run.json."""
        self.write(RUN_FACTS, replace(self.facts, **facts))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        with self.path("metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will do again."""
        path = self.path("metrics.jsonl")
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            self.write_text("metrics.jsonl", "".join(line + "\n" for line in lines))

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = [
            path
            for path in self.folder.glob("checkpoint-*")
            if path.name.rpartition("-")[2].isdecimal() and _is_whole(path)
        ]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    @property
    def results(self) -> dict[str, Any]:
        """What came out: results.json, comparison.json or bench.json; {} until it is there.

        Of a training, ``before`` and ``after``: figure -> value on the held-out rows.
        """
        return next(filter(None, map(self.read_json, RESULTS)), {})

    @property
    def status(self) -> str:
        """``running``, ``done``, ``failed`` or ``interrupted``; ``not begun`` before any."""
        return str(self.read_json("run.json").get("status", "not begun"))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    @property
    def finished(self) -> bool:
        """Whether the student or the drafter is trained, measured and saved."""
        return (self.folder / "README.md").exists()

    @contextmanager
    def closed_after(self, tell: Callable[[Ended], None] = lambda status: None) -> Iterator[None]:
        """Do what is inside, record how it ended, tell it, and let go of the folder."""
        status: Ended = "failed"
        try:
            yield
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            try:
                self.update(status=status, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
                tell(status)
            finally:
                self._held.release()

    def _empty(self) -> None:
        """Remove what is not the lock: what says that it is a finished run first, or a run last.

        A kill in between then leaves what can be overwritten again; and no checkpoint outlives what
        keeps another run from going on with it.
        """
        order = {"README.md": -1, "before.json": 1, "spec.yaml": 1, "run.json": 2}
        for item in sorted(self.folder.iterdir(), key=lambda item: order.get(item.name, 0)):
            if item.name != "lock":
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder, also afterwards unless what is inside fails.

        The system lets go of it when the process ends, however that happens.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.acquire()
        except Timeout:
            raise UserError(
                f"another process is writing {self.folder}",
                "wait for it, or choose another run folder (run=FOLDER)",
            ) from None
        except OSError as fault:
            raise UserError(
                f"{self.folder} cannot be written: {fault.strerror}",
                "choose another run folder (run=FOLDER)",
            ) from fault
        try:
            yield
        except BaseException:
            self._held.release()
            raise


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours: other programs write a run.json too."""
    try:
        return bool(json.loads((folder / "run.json").read_text("utf-8"))["versions"]["kdcore"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's last file is there, and not cut short by a kill."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the line a kill cut short
        return 2**62


def _differences(left: Any, right: Any, path: str = "") -> set[str]:
    """Dotted paths at which two plain trees differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        return {
            found
            for key in left.keys() | right.keys()
            for found in _differences(left.get(key), right.get(key), f"{path}.{key}".lstrip("."))
        }
    return set() if left == right else {path}
