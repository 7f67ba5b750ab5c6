"""``kdcore distill`` and ``evaluate``, over a stand-in for the training itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.runs.folder import Run
from kdcore.runs.results import Metric
from kdcore_cli.terminal import console
from tests.cli.conftest import RESULTS, Kdcore


def test_distill_shows_progress_results_and_where_the_student_is(
    kdcore: Kdcore, training: dict[str, Any], installed: Registry
) -> None:
    said = kdcore("distill", "spec.yaml", "--set", "training.steps=3", "--out", "runs/it is")
    assert said.code == 0
    assert training["registry"] is installed
    assert training["spec"].training.steps == 3
    assert training["spec"].run == Path("runs/it is")
    assert "train 2/2  took 0:00  loss 1.25" in said.err
    table = [line.split() for line in said.out.splitlines()]
    assert ["teacher", "KL", "2.500", "0.500"] in table
    assert ["top-1", "agreement", "25.0%", "75.0%"] in table
    assert ["speed", "-", "-"] in table
    assert f"student: {Path('runs/it is/model').resolve()}" in said.out


def test_samples_stand_below_each_other_at_80_columns_and_side_by_side_at_100(
    kdcore: Kdcore, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = kdcore("distill", "spec.yaml", "--quiet")
    assert narrow.err == ""
    lines = [line.strip() for line in narrow.out.splitlines()]
    assert any("What is the capital [bold]of France[/bold]?" in line for line in lines)
    assert lines.index("It is Paris.") == lines.index("after") + 1
    monkeypatch.setenv("COLUMNS", "120")
    wide = kdcore("evaluate", "runs/distill")
    lines = wide.out.splitlines()
    assert any("Paris is the capital." in line and "It is Paris." in line for line in lines)
    assert max(map(len, lines)) <= 120
    assert json.loads(kdcore("evaluate", "runs/distill", "--json").out) == RESULTS


def test_a_run_is_neither_overwritten_nor_resumed_unasked(
    kdcore: Kdcore, training: dict[str, Any]
) -> None:
    assert kdcore("distill", "spec.yaml").code == 0
    said = kdcore("distill", "spec.yaml")
    assert said.code == 2
    assert "runs/distill already contains a run" in said.err
    assert "continue it with --resume, replace it with --overwrite" in said.err
    assert kdcore("distill", "spec.yaml", "--overwrite").code == 0
    assert kdcore("distill", "spec.yaml", "--resume").code == 0
    training["refuses"] = UserError("there is no such teacher", "name another")
    (Path("runs/distill") / "kept").touch()
    refused = kdcore("distill", "spec.yaml", "--overwrite")
    assert refused.code == 2 and "there is no such teacher" in refused.err
    assert Path("runs/distill/kept").exists(), "what cannot be done costs nothing old"
    changed = kdcore("distill", "spec.yaml", "--resume", "--set", "training.steps=3")
    assert changed.code == 2
    assert "started with a different spec; changed: training.steps" in changed.err
    assert kdcore("distill", "spec.yaml", "--resume", "--set", "training.chunk=3").code == 0


def test_an_interrupted_run_says_what_resumes_it(kdcore: Kdcore, training: dict[str, Any]) -> None:
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    training["does"] = interrupted
    said = kdcore("distill", "spec.yaml", "--overwrite", "--set", "method.tau=[[0, 1]]", "--json")
    assert said.code == 130
    words = "distill spec.yaml --set 'method.tau=[[0, 1]]' --json --resume"
    assert said.err.splitlines()[-1] == f"interrupted: resume with: kdcore {words}"


def test_a_users_mistake_inside_a_run_is_code_2(kdcore: Kdcore, training: dict[str, Any]) -> None:
    def mistaken(run: Run) -> None:
        raise UserError("no such model", "name another")

    training["does"] = mistaken
    said = kdcore("distill", "spec.yaml")
    assert said.code == 2
    assert said.err.splitlines()[-2:] == ["error: no such model", "  fix: name another"]


def test_evaluate_of_a_run_that_is_not_done(kdcore: Kdcore, training: dict[str, Any]) -> None:
    training["does"] = lambda run: None
    kdcore("distill", "spec.yaml", "--set", "run=unfinished")
    run = Run(Path("unfinished"))
    run.path("results.json").unlink(missing_ok=True)
    run.update(status="interrupted")
    said = kdcore("evaluate", "unfinished")
    assert said.code == 2
    assert "has no results; its status is 'interrupted'" in said.err
    assert "--resume" in said.err


def test_evaluate_measures_what_the_flags_say(
    kdcore: Kdcore, installed: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    outcome = SimpleNamespace(
        model={"name": str(Path("some/model").resolve())},  # shown as the user would write it
        metrics=[Metric(**RESULTS["metrics"][1])],
        figures={"agreement": 0.75},
        lm_eval={"tiny": {"acc,none": 0.5}},
        samples=[{"prompt": "What?", "model": "It is [b]Paris[/b]."}],
    )

    def evaluate(spec: Any, **options: Any) -> Any:
        asked.append(spec)
        return outcome

    monkeypatch.setitem(sys.modules, "kdcore.jobs.evaluate", SimpleNamespace(evaluate=evaluate))  # type: ignore[arg-type]
    said = kdcore("evaluate", "some/model", "--lm-eval", "tiny,other", "--quiet")
    assert said.code == 0, said.err
    assert asked[0].model.model == "some/model" and asked[0].lm_eval == ["tiny", "other"]
    lines = [line.split() for line in said.out.splitlines()]
    assert ["held-out", "some/model"] in lines and ["top-1", "agreement", "75.0%"] in lines
    assert ["tiny", "acc,none", "0.5000"] in lines and ["It", "is", "[b]Paris[/b]."] in lines


def test_evaluate_that_cannot_measure_says_why(kdcore: Kdcore) -> None:
    said = kdcore("evaluate", "runs/a", "runs/../runs/a")
    assert said.code == 2 and "error: a run is named twice" in said.err
    said = kdcore("evaluate", "some/model")
    assert said.code == 2 and "--data is missing" in said.err
    said = kdcore("evaluate", "some/model", "--data", "rows.txt")
    assert said.code == 2 and "name a .jsonl or .csv file" in said.err
    said = kdcore("evaluate", "some/model", "--answers", "rouge")
    assert said.code == 2 and "evaluation.answers.0" in said.err


def test_a_run_without_held_out_rows_says_so(kdcore: Kdcore, training: dict[str, Any]) -> None:
    nothing = RESULTS | {"before": {}, "after": {}, "samples": []}
    training["does"] = lambda run: run.write_text("results.json", json.dumps(nothing))
    assert "the spec does not set data.heldout" in kdcore("distill", "spec.yaml").out


def test_a_run_that_measured_once_has_one_column(kdcore: Kdcore, training: dict[str, Any]) -> None:
    (sample,) = RESULTS["samples"]
    once = {"before": {}, "samples": [{n: text for n, text in sample.items() if n != "before"}]}
    training["does"] = lambda run: run.write_text("results.json", json.dumps(RESULTS | once))
    said = kdcore("distill", "spec.yaml").out
    assert "before" not in said
    lines = [line.split() for line in said.splitlines()]
    for row in (["held-out", "after"], ["teacher", "KL", "0.500"], ["speed", "-"]):
        assert row in lines


def test_bars_show_their_figures_in_a_terminal() -> None:
    import io

    from rich.console import Console

    from kdcore_cli.terminal.progress import Bars, progress_on

    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80, highlight=False)
    progress = progress_on(terminal, quiet=False)
    assert isinstance(progress, Bars)
    with progress.stage("train", 4, done=1) as stage:
        stage.advance(loss=1.5)
        progress.note("12 rows dropped")
        with progress.stage("measure", 2) as inner:
            inner.advance(2)
        stage.advance(2, loss=0.25)
    shown = file.getvalue()
    for phrase in ("train", "measure", "4/4", "loss 0.25", "12 rows dropped"):
        assert phrase in shown


@pytest.mark.parametrize("in_terminal", [True, False])
def test_a_stage_without_work_is_not_shown(in_terminal: bool) -> None:
    import io

    from rich.console import Console

    from kdcore_cli.terminal.progress import progress_on

    file = io.StringIO()
    console = Console(file=file, force_terminal=in_terminal, width=80)
    with progress_on(console, quiet=False).stage("answers to score", 0):
        pass
    assert "answers" not in file.getvalue()


def test_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from kdcore_cli.terminal import progress

    now = iter([0.0, 5.0, 20.0, 30.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    file = io.StringIO()
    with progress.Lines(Console(file=file, width=80)).stage("train", 100, done=10) as stage:
        stage.advance(5, loss=2.0)
        stage.advance(15, loss=1.0)
        stage.advance(70)
    assert file.getvalue().splitlines() == [
        "train 30/100  1:10 left  loss 1",
        "train 100/100  took 1:00  loss 1",
    ]
    assert progress.duration(3723.4) == "1:02:03"


def test_the_console_is_made_once() -> None:
    assert console.err() is console.err()


def test_evaluate_of_a_run_that_is_done_without_results_does_not_name_resume(
    kdcore: Kdcore, training: dict[str, Any]
) -> None:
    kdcore("distill", "spec.yaml", "--set", "run=emptied")
    Run(Path("emptied")).path("results.json").unlink()
    said = kdcore("evaluate", "emptied")
    assert said.code == 2
    assert "has no results; its status is 'done'" in said.err
    assert "--resume" not in said.err and "kdcore report emptied" in said.err
