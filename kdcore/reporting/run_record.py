"""All that a run folder tells, read and checked, whoever wrote it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from kdcore.errors import UserError, nearest
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.runs.folder import Run, is_run
from kdcore.runs.results import (
    GATES_FILE,
    REPLAY_FILE,
    Begun,
    Bench,
    Comparison,
    Difference,
    Judged,
    JudgedResponse,
    Measured,
    Replay,
)

Shape = TypeVar("Shape")
Step = Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A run as it is on disk; what it has not is empty or None.

    name: tells it from the others on the page. facts: run.json. steps: what was logged, in order.
    changes: after minus before, of the figures that are kept by row. cost: of a comparison's cell.
    """

    name: str
    folder: Path
    job: str
    facts: dict[str, Any]
    spec: str
    steps: list[Step]
    judged: Judged | None
    changes: dict[str, Difference]
    gates: list[JudgedResponse]
    replays: list[Replay]
    bench: Bench | None
    comparison: Comparison | None
    cost: dict[str, float]

    @property
    def status(self) -> str:
        """How its work ended, or that it has not."""
        return str(self.facts.get("status", "unknown"))

    def values(self, name: str) -> list[tuple[int, float]]:
        """A logged figure: step, value."""
        return [(int(line["step"]), line[name]) for line in self.steps if name in line]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in some folders, named apart.

    Raises UserError for a folder that holds no run, and for a file that kdcore has not written so.
    """
    for folder in folders:
        _refuse_other(folder)
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, name) for folder, name in zip(whole, _names(whole), strict=True)]


def _refuse_other(folder: Path) -> None:
    if not is_run(folder):
        beside = [path.name for path in folder.parent.glob("*") if is_run(path)]
        known = f": {nearest(folder.name, beside)}" if beside else ", e.g. runs/distill"
        raise UserError(f"{folder} holds no run", f"name the folder that a run wrote{known}")


def _read(folder: Path, name: str) -> RunRecord:
    run = Run(folder)
    spec = run.path("spec.yaml")
    with _as_written(spec):
        asked = run.spec() if spec.exists() else {}
    before = _shaped(run, "before.json", Begun, Begun())
    begun = Judged(before.figures) if before.figures else None
    return RunRecord(
        name,
        folder,
        str(asked.get("job", "?")) if isinstance(asked, dict) else "?",
        _shaped(run, "run.json", dict[str, Any], {}),
        spec.read_text("utf-8") if spec.exists() else "",
        _steps(run.path("metrics.jsonl")),
        _shaped(run, "results.json", Judged, begun),
        _changes(run),
        _shaped(run, GATES_FILE, list[JudgedResponse], []),
        _shaped(run, REPLAY_FILE, list[Replay], []),
        _shaped(run, "bench.json", Bench, None),
        _shaped(run, "comparison.json", Comparison, None),
        _shaped(run, "cost.json", dict[str, float], {}),
    )


def _shaped(run: Run, name: str, shape: Any, otherwise: Any) -> Any:
    """A file of the folder, checked; ``otherwise`` when it is not there."""
    path = run.path(name)
    if not path.exists():
        return otherwise
    with _as_written(path):
        return TypeAdapter(shape).validate_python(json.loads(path.read_text("utf-8")))


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Inside, what is wrong with a file's content is told as such."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as fault:
        said = str(fault).splitlines()
        where = f": {said[1]}" if len(said) > 1 else ""
        raise UserError(
            f"{path} is not as kdcore writes it{where}",
            "remove the file, or carry out the run again",
        ) from fault


def _steps(path: Path) -> list[Step]:
    """The lines of metrics.jsonl, without the one that a kill cut short."""
    found: list[Step] = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            numbers = {
                name: value
                for name, value in values.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
        except (ValueError, AttributeError, OverflowError, RecursionError):
            continue
        if "step" in numbers:
            found.append(numbers)
    return found


def _changes(run: Run) -> dict[str, Difference]:
    """With the interval of a paired bootstrap over the held-out rows, where figures are by row."""
    rows = _shaped(run, "heldout_rows.json", dict[str, dict[str, Any]], {})
    if not all("lengths" in rows.get(side, {}) for side in ("before", "after")):
        return {}
    with _as_written(run.path("heldout_rows.json")):
        sides = TypeAdapter(dict[str, Measured]).validate_python(rows)
        return paired_differences([sides["after"]], [sides["before"]])


def _names(folders: Sequence[Path]) -> list[str]:
    """What differs in the shortest ends of the paths that tell them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        ends = [("",) * (length - len(f.parts)) + f.parts[-length:] for f in folders]
        if len(set(ends)) == len(ends):
            break
    if len(ends) == 1:
        return [folders[0].name]
    places = [place for place in zip(*ends, strict=True) if len(set(place)) > 1]
    return ["/".join(parts) for parts in zip(*places, strict=True)]
