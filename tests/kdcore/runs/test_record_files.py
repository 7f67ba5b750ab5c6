"""Each JSON file of a run folder is read as it was written, by whatever version, or refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.runs import comparison_results, facts, results
from kdcore.runs.comparison_results import (
    BENCH_RESULTS,
    COMPARISON,
    Arm,
    BenchResults,
    BenchRow,
    ChosenBy,
    Comparison,
    GridPoint,
    Speedup,
)
from kdcore.runs.facts import RUN_FACTS, GeneratedResponses, ModelOrigin, RunFacts, RunInput
from kdcore.runs.folder import Run
from kdcore.runs.record_files import RecordFile
from kdcore.runs.results import (
    CELL_COST,
    CELL_FAILURE,
    FIRST_MEASUREMENT,
    HELDOUT_ROWS,
    REPLAYS,
    TOKEN_GATES,
    TRAINING_RESULTS,
    CellFailure,
    Cost,
    Difference,
    GatedResponse,
    GatedToken,
    HeldOutResults,
    HeldOutRows,
    Measured,
    Metric,
    Node,
    Replay,
    Round,
    TrainingResults,
)
from tests.kdcore.reporting import run_folders

METRIC = Metric("teacher_kl", "teacher KL", ".3f", "lower")
ROWS = Measured([3, 2], {"teacher_kl": [1.5, 0.5]}, {"rouge_l": [0.25]}, {"tau": ([3], [2])})
GAP = {"teacher_kl": Difference(-0.5, -0.75, -0.25)}
ARM = Arm(
    arm="speckd",
    seeds=[0],
    figures={"teacher_kl": 1.5},
    cost=Cost(7.5, 100.0, 2.0**31),
    differences=GAP,
    controls={"random": GAP},
    grid=[GridPoint({"method.tau": 2}, {"teacher_kl": 1.5})],
    chosen={"method.tau": 2},
)
BENCHED = BenchRow(
    method="medusa",
    temperature=0.0,
    batch_size=1,
    tokens_per_second=20.0,
    speedup={"generate": Speedup({"maths": 2.0}, 2.0, None, None)},
    identical=1.0,
    tau=2.5,
    acceptance=[0.75, 0.5],
    draft_ms=1.0,
    verify_ms=2.0,
    predicted=1.75,
)
FACTS = RunFacts(
    status="done",
    started="2026-11-27T09:12:22+0000",
    ended="2026-11-27T09:13:22+0000",
    versions={"kdcore": "1.2.3"},
    plugins={"speckd": "kdcore==1.2.3"},
    plugin_faults={"mine: kdcore_step_done": "ValueError: no"},
    inputs={"the teacher": RunInput("a" * 64, "b" * 64)},
    teacher=ModelOrigin("some/teacher", "c" * 64),
    student=ModelOrigin("some/student", "d" * 64),
    reference=ModelOrigin("some/reference", "e" * 64),
    target=ModelOrigin("some/target", "f" * 64),
    responses=GeneratedResponses(4, 1, 6, 5, 60, 1.5),
)
TOKEN = GatedToken(" mat", 0.5, 0.55, {"speckd": 0.55}, [(" mat", 0.75)], [(" hat", 0.5)])
WRITTEN: list[tuple[RecordFile[Any], Any]] = [
    (RUN_FACTS, FACTS),
    (FIRST_MEASUREMENT, HeldOutResults({"teacher_kl": 0.4}, ROWS, ["the mat"])),
    (
        TRAINING_RESULTS,
        TrainingResults(
            before={"teacher_kl": 2.0},
            after={"teacher_kl": 1.0},
            metrics=[METRIC],
            samples=[{"prompt": "où?", "after": "là"}],
            kept_by="tau on data.validation",
            kept_by_these_rows=True,
        ),
    ),
    (HELDOUT_ROWS, HeldOutRows(ROWS, ROWS)),
    (TOKEN_GATES, [GatedResponse("row", "the", [TOKEN])]),
    (
        REPLAYS,
        [Replay("medusa", "the", [Round([Node("mat", -1, True)], ["mat", "sat"])])],
    ),
    (CELL_COST, Cost(7.5, 100.0, 2.0**31)),
    (CELL_FAILURE, CellFailure("no memory")),
    (
        COMPARISON,
        Comparison(
            baseline="kd",
            seeds=[0, 1],
            metrics=[METRIC],
            arms=[ARM],
            failures={"kd, seed 1": "no memory"},
            kept_by_these_rows=["speckd"],
            chosen_by=ChosenBy(METRIC, {"name": "chat"}, [2]),
        ),
    ),
    (BENCH_RESULTS, BenchResults(target="some/target", sets=["maths"], rows=[BENCHED])),
]
EMPTY: list[tuple[RecordFile[Any], Any, Any]] = [
    (RUN_FACTS, RunFacts(), {"status": "unknown", "started": "", "versions": {}, "plugins": {}}),
    (FIRST_MEASUREMENT, HeldOutResults(), {"figures": {}, "rows": {}, "answers": []}),
    (
        TRAINING_RESULTS,
        TrainingResults(),
        {"before": {}, "after": {}, "metrics": [], "samples": []},
    ),
    (HELDOUT_ROWS, HeldOutRows(), {"before": {}, "after": {}}),
    (CELL_COST, Cost(1.0, 2.0), {"seconds": 1.0, "tokens": 2.0}),
    (TOKEN_GATES, [], []),
    (REPLAYS, [], []),
]


def files_of(*modules: Any) -> set[str]:
    known = (each for module in modules for each in vars(module).values())
    return {each.name for each in known if isinstance(each, RecordFile)}


def test_every_file_is_tried_here() -> None:
    assert files_of(results, comparison_results, facts) == {file.name for file, _ in WRITTEN}


@pytest.mark.parametrize(("file", "record"), WRITTEN, ids=lambda each: getattr(each, "name", ""))
def test_what_is_written_is_read(tmp_path: Path, file: RecordFile[Any], record: Any) -> None:
    run = Run(tmp_path, planned=True)
    assert run.read(file) is None
    run.write(file, record)
    assert run.read(file) == record


@pytest.mark.parametrize(
    ("file", "record", "content"), EMPTY, ids=lambda each: getattr(each, "name", "")
)
def test_what_there_is_not_is_left_out(
    tmp_path: Path, file: RecordFile[Any], record: Any, content: Any
) -> None:
    run = Run(tmp_path, planned=True)
    run.write(file, record)
    assert json.loads(run.path(file.name).read_text()) == content
    assert run.read(file) == record


def test_a_figure_that_is_no_number_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, planned=True)
    run.write(TRAINING_RESULTS, TrainingResults(after={"perplexity": math.nan, "tau": math.inf}))
    kept = run.read(TRAINING_RESULTS)
    assert kept is not None and math.isnan(kept.after["perplexity"])
    assert kept.after["tau"] == math.inf


@pytest.mark.parametrize(("file", "record"), WRITTEN, ids=lambda each: getattr(each, "name", ""))
def test_a_damaged_file_is_refused_by_its_name(
    tmp_path: Path, file: RecordFile[Any], record: Any
) -> None:
    whole = file.text(record)
    several = isinstance(record, list)
    for content in (whole[: len(whole) // 2], "[" * 100_000, "{}" if several else "[]", '"'):
        (tmp_path / file.name).write_text(content)
        with pytest.raises(
            UserError, match=f"{file.name} does not have the format that kdcore writes"
        ):
            Run(tmp_path, planned=True).read(file)


def test_a_file_of_another_version_is_read(tmp_path: Path) -> None:
    """What it has beyond the record is passed over, what it lacks has a default."""
    old = {
        RUN_FACTS.name: {"status": "done", "versions": {"kdcore": "0.1"}, "host": "here"},
        FIRST_MEASUREMENT.name: {"figures": {"tau": 1}, "rows": {"lengths": [1], "sums": {}}},
        TRAINING_RESULTS.name: {"before": {}, "after": {"tau": 2}, "metrics": [], "colour": "red"},
        HELDOUT_ROWS.name: {"before": {}, "after": {"lengths": [1], "sums": {"a": [2]}}},
        COMPARISON.name: {"baseline": "kd", "seeds": [0], "metrics": [], "failures": {}}
        | {"arms": [{"arm": "kd", "seeds": [], "grid": [{"fields": {"lr": 1}}]}]},
        CELL_COST.name: {"seconds": 1, "tokens": 2},
    }
    for name, content in old.items():
        (tmp_path / name).write_text(json.dumps(content))
    run = Run(tmp_path, planned=True)
    assert run.facts == RunFacts(status="done", versions={"kdcore": "0.1"})
    assert run.read(FIRST_MEASUREMENT) == HeldOutResults({"tau": 1.0}, Measured([1]))
    assert run.read(TRAINING_RESULTS) == TrainingResults(after={"tau": 2.0})
    assert run.read(HELDOUT_ROWS) == HeldOutRows(None, Measured([1], {"a": [2.0]}))
    arm = Arm("kd", [], grid=[GridPoint({"lr": 1})])
    assert run.read(COMPARISON) == Comparison("kd", [0], [], [arm], {})
    assert run.read(CELL_COST) == Cost(1.0, 2.0)


def test_run_json_gathers_facts(tmp_path: Path) -> None:
    run = Run(tmp_path, planned=True)
    run.update(status="running", versions={"kdcore": "1.2.3"})
    run.update(status="done")
    assert run.facts == RunFacts(status="done", versions={"kdcore": "1.2.3"})
    with pytest.raises(TypeError, match="colour"):
        run.update(colour="red")


def test_a_page_is_drawn_without_torch(tmp_path: Path) -> None:
    folders = [
        run_folders.distilled(tmp_path / "distill"),
        run_folders.drafting(tmp_path / "drafter"),
        run_folders.benched(tmp_path / "bench"),
        run_folders.compared(tmp_path / "compare"),
    ]
    code = (
        "import sys; from pathlib import Path; from kdcore.reporting.page import report; "
        "assert '</html>' in report([Path(each) for each in sys.argv[1:]]); "
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
