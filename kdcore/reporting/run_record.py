"""The record of a run for reports, read from its folder and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.runs.comparison_results import BENCH_RESULTS, COMPARISON, BenchResults, Comparison
from kdcore.runs.facts import RunFacts
from kdcore.runs.folder import Run
from kdcore.runs.recognition import refuse_no_run
from kdcore.runs.record_files import as_written
from kdcore.runs.results import (
    CELL_COST,
    FIRST_MEASUREMENT,
    HELDOUT_ROWS,
    REPLAYS,
    TOKEN_GATES,
    TRAINING_RESULTS,
    Cost,
    Difference,
    GatedResponse,
    Replay,
    TrainingResults,
)

Step = Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A run as it is on disk; missing parts are empty or None.

    Attributes:
        name: The run's name on the page.
        folder: The run folder.
        job: The job of the spec.
        facts: The record of run.json.
        spec: The text of the resolved spec.
        steps: The lines of the log, in order.
        results: The figures; of an unfinished run, those before the training.
        changes: Figure -> after minus before, for figures that are stored by row.
        gates: Gate weights of the tokens of a few responses.
        replays: Prompts decoded round by round.
        bench: The results of a benchmark.
        comparison: The results of a comparison.
        cost: The cost of a comparison's cell.
    """

    name: str
    folder: Path
    job: str
    facts: RunFacts
    spec: str
    steps: list[Step]
    results: TrainingResults | None
    changes: dict[str, Difference]
    gates: list[GatedResponse]
    replays: list[Replay]
    bench: BenchResults | None
    comparison: Comparison | None
    cost: Cost | None

    @property
    def status(self) -> str:
        """The run's status."""
        return self.facts.status

    def values(self, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) points of a logged figure."""
        return [(int(line["step"]), line[name]) for line in self.steps if name in line]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs, and give each a distinct name.

    Args:
        folders: The run folders; duplicates are read once.

    Returns:
        The records, in order.

    Raises:
        UserError: There is no folder, one is not a run folder, or a file does not have kdcore's
            format.
    """
    if not folders:
        raise UserError("no run is named", "name the folder of a run, e.g. runs/distill")
    for folder in folders:
        refuse_no_run(folder)
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, name) for folder, name in zip(whole, _names(whole), strict=True)]


def _read(folder: Path, name: str) -> RunRecord:
    run = Run(folder)
    spec = run.path("spec.yaml")
    with as_written(spec):
        asked = run.spec() if spec.exists() else {}
    first = run.read(FIRST_MEASUREMENT)
    begun = TrainingResults(first.figures) if first and first.figures else None
    return RunRecord(
        name,
        folder,
        str(asked.get("job", "?")) if isinstance(asked, dict) else "?",
        run.facts,
        spec.read_text("utf-8") if spec.exists() else "",
        _steps(run.path("metrics.jsonl")),
        run.read(TRAINING_RESULTS) or begun,
        _changes(run),
        run.read(TOKEN_GATES) or [],
        run.read(REPLAYS) or [],
        run.read(BENCH_RESULTS),
        run.read(COMPARISON),
        run.read(CELL_COST),
    )


def _steps(path: Path) -> list[Step]:
    """Read the lines of metrics.jsonl; a line that a kill truncated is skipped."""
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
    """The changes during the training, with intervals of a paired bootstrap over held-out rows."""
    rows = run.read(HELDOUT_ROWS)
    if rows is None or rows.before is None or rows.after is None:
        return {}
    with as_written(run.path(HELDOUT_ROWS.name)):  # the file may pair different rows
        return paired_differences([rows.after], [rows.before])


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders: the differing parts of the shortest distinct ends of their paths."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        ends = [("",) * (length - len(f.parts)) + f.parts[-length:] for f in folders]
        if len(set(ends)) == len(ends):
            break
    if len(ends) == 1:
        return [folders[0].name]
    places = [place for place in zip(*ends, strict=True) if len(set(place)) > 1]
    return ["/".join(parts) for parts in zip(*places, strict=True)]
