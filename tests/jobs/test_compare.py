"""Arms, controls, failures and resume of a comparison; each cell in a process of its own."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import POLLERR, poll
from textwrap import dedent
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from pydantic import ValidationError
from rich.console import Console

from kdcore.errors import UserError
from kdcore.jobs import cell_process
from kdcore.jobs import compare as comparison
from kdcore.jobs.compare import compare
from kdcore.method.hookspecs import Component
from kdcore.method.registry import installed
from kdcore.reporting.page import report
from kdcore.runs.comparison_results import COMPARISON
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.runs.progress import Silent
from kdcore.runs.results import Metric, TrainingResults
from kdcore.specs.compare import CompareSpec, changed
from kdcore.specs.distill import DistillSpec
from kdcore.specs.jobs import JOBS
from kdcore.specs.reading.file import read_spec
from kdcore_cli import console, main
from kdcore_cli.comparison_table import show_comparison
from tests.fixtures import fake_distributions as fake
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": f"the mat of {n}?", "response": f"the teacher sat {n}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "chat", "path": str(folder / "rows.jsonl")}
    return {
        "teacher": {"model": str(saved(tiny_model(), folder / "teacher"))},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"samples": 0, "answers": ["rouge_l"], "answer_tokens": 4},
    }


def asked(folder: Path, base: dict[str, Any], **fields: Any) -> Path:
    spec = {"job": "compare", "run": str(folder / "run"), "base": base} | fields
    (folder / "compare.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return folder / "compare.yaml"


@pytest.fixture
def kdcore(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command line in this process; its cells are processes of their own all the same."""

    def run(*arguments: Any) -> SimpleNamespace:
        console.out.cache_clear()  # pytest's capture has replaced the streams
        console.err.cache_clear()
        code = main.run([*map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def compare_spec(file: Path) -> CompareSpec:
    spec = read_spec(file)
    assert isinstance(spec, CompareSpec)
    return spec


def shown(outcome: dict[str, Any], metric: str) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    show_comparison(console, COMPARISON.of_plain(outcome), metric)
    return " ".join(console.export_text().split())


def test_only_arms_with_one_gate_are_counted_with_controls(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    gated = {"one": {"method": {"gates": ["speckd"]}}, "two": {"method": {"gates": ["all", "all"]}}}
    fields = {"arms": {"kd": {}, **gated}, "seeds": [0, 1], "controls": True}
    spec = compare_spec(asked(tmp_path, base, **fields))
    assert comparison._cells_in_all(spec) == 2 * (3 + 3)
    rows = base["data"]["heldout"] | {"limit": 3}
    grid = {"grid": {"method.tau": [1, 2, 4]}, "validation": rows, "trials": 2}
    spec = compare_spec(asked(tmp_path, base, **fields, **grid))
    assert comparison._cells_in_all(spec) == 2 * (3 + 3) + 3 * 3 * 2
    assert spec.trial_seeds == [2, 3], "none of those that are reported"


def test_arms_controls_and_a_cell_that_fails(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    arms = {
        "kd": {},
        "speckd": {"method": {"gates": ["speckd"]}},
        "broken": {"student": {"layers": [0, 99]}},
    }
    file = asked(tmp_path, base, arms=arms, seeds=[3], controls=True, draws=50)
    checked = kdcore("check", file)
    assert checked.returncode == 2 and "arm 'broken'" in checked.stderr
    done = kdcore("compare", file, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    rows = {row["arm"]: row for row in outcome["arms"]}
    gated = {"speckd", "speckd+random", "speckd+uniform", "speckd+inverted"}
    assert rows.keys() == {"kd", "broken", *gated}
    assert "99" in outcome["failures"]["broken, seed 3"] and "figures" not in rows["broken"]
    for arm in rows.keys() - {"broken"}:
        assert rows[arm]["cost"]["tokens"] == rows["kd"]["cost"]["tokens"], "the same budget"
        for figure in ("teacher_kl", "rouge_l"):
            gap = rows[arm]["differences"][figure]
            assert gap["low"] <= gap["mean"] <= gap["high"]
    assert rows["kd"]["differences"]["teacher_kl"]["mean"] == 0.0
    assert rows["speckd"]["controls"].keys() == {"random", "uniform", "inverted"}
    assert all(rows[arm]["controls"] == {} for arm in rows.keys() - {"speckd"})
    for control, gaps in rows["speckd"]["controls"].items():
        both = (rows[arm]["figures"]["teacher_kl"] for arm in ("speckd", f"speckd+{control}"))
        own, chance = both
        assert gaps["teacher_kl"]["mean"] == pytest.approx(own - chance)
    assert "speckd random" in shown(outcome, "teacher_kl")
    spec_of_control = (tmp_path / "run/cells/speckd+random/seed-3/spec.yaml").read_text()
    lines = (tmp_path / "run/cells/speckd/seed-3/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("acceptance/speckd") for line in lines]
    rates = [rate for rate in rates if rate is not None]
    assert f"rate: {sum(rates) / len(rates)}"[:10] in spec_of_control
    page = (tmp_path / "run" / "comparison.html").read_text("utf-8")
    assert page == report([tmp_path / "run"]), "as kdcore report draws it"
    assert "speckd minus speckd+random" in page
    assert "differences from kd" in page and "failed: broken, seed 3: layers [99]" in page

    before = (tmp_path / "run/cells/kd/seed-3/run.json").read_text()
    assert kdcore("compare", file).returncode == 2
    again = kdcore("compare", file, "--resume", "--metric", "rouge_l")  # else the first there is
    assert again.returncode == 0, again.stderr
    assert "ROUGE-L" in again.stdout and "failed: broken, seed 3" in again.stdout
    assert (tmp_path / "run/cells/kd/seed-3/run.json").read_text() == before, "not run again"


def test_each_arm_is_compared_at_the_point_that_other_rows_chose(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """In the mean of its trials; also where every point of an arm fails."""
    other = [{"prompt": f"the student of {n}?", "response": f"sat on {n}"} for n in range(4)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    arms = {"kd": {}, "adamless": {"training": {"optimizer": "sgd"}}, "torn": {"student": TORN}}
    file = asked(
        tmp_path,
        base | {"evaluation": {"samples": 0}},
        arms=arms,
        seeds=[0],
        grid={"training.learning_rate": [1e-6, 1e-2]},
        validation={"name": "chat", "path": str(tmp_path / "other.jsonl")},
        choose_by="perplexity",
        trials=2,
        draws=20,
    )
    outcome = compare(compare_spec(file)).read_json("comparison.json")
    rows = {row["arm"]: row for row in outcome["arms"]}
    chosen_by = outcome["chosen_by"]
    assert chosen_by["metric"]["name"] == "perplexity" and chosen_by["seeds"] == [1, 2]
    assert "other" in chosen_by["rows"]["path"] and outcome["seeds"] == [0]
    said = shown(outcome, "teacher_kl")
    assert f"was lowest on the validation rows ({tmp_path / 'other.jsonl'}), in the mean" in said
    assert "in the mean of seeds 1, 2:" in said
    for arm in ("kd", "adamless"):
        tried = [each["figures"]["perplexity"] for each in rows[arm]["grid"]]
        best = rows[arm]["grid"][tried.index(min(tried))]["fields"]
        assert rows[arm]["chosen"] == best, "on the other rows"
        place = outcome_folder(tmp_path, arm, tried.index(min(tried)))
        figures = json.loads((place / "seed-0/results.json").read_text())["after"]
        assert rows[arm]["figures"] == figures, "on the rows that are reported"
        assert figures["perplexity"] not in tried
        trials = [Run(place / f"seed-{seed}") for seed in (1, 2)]
        for seed, trial in enumerate(trials, start=1):
            spec = trial.spec()
            assert spec["seed"] == seed and "other" in spec["data"]["heldout"]["path"]
        each = [trial.read_json("results.json")["after"]["perplexity"] for trial in trials]
        assert each[0] != each[1] and min(tried) == pytest.approx(sum(each) / 2)
    assert rows["torn"]["chosen"] is None and "figures" not in rows["torn"]
    failed = {f"torn, point {point}, seed {seed}" for point in (0, 1) for seed in (1, 2)}
    assert outcome["failures"].keys() == failed
    said = shown(outcome, "perplexity")
    rate = rows["kd"]["chosen"]["training.learning_rate"]
    assert f"kd: training.learning_rate {rate} (the edge of the grid)" in said
    assert "torn: nothing to choose from" in said


TORN = {"layers": [0, 99]}


def outcome_folder(folder: Path, arm: str, point: int) -> Path:
    return folder / "run" / "cells" / arm / f"point-{point}"


def test_a_grid_that_chooses_on_reported_rows_is_told(tmp_path: Path, base: dict[str, Any]) -> None:
    class Told(Silent):
        lines: list[str] = []  # noqa: RUF012

        def note(self, line: str) -> None:
            self.lines.append(line)

    heldout = base["data"]["heldout"]
    file = asked(tmp_path, base, arms={"kd": {}}, grid=GRID, validation=heldout | {"limit": 3})
    comparison._note_chosen_on(compare_spec(file), installed(), Told())
    assert Told.lines == [
        "3 of 8 held-out rows are chosen on as well (validation), which flatters the figures"
    ]


GRID = {"training.learning_rate": [1e-3, 1e-2]}


def test_an_arm_that_lacks_a_seed_is_told() -> None:
    gap = {"mean": 0.5, "low": 0.1, "high": 0.9}
    arms = [{"arm": "kd", "seeds": [0, 1], "figures": {"teacher_kl": 1.0}}]
    arms += [
        {
            "arm": "a",
            "seeds": [1],
            "figures": {"teacher_kl": 1.5},
            "differences": {"teacher_kl": gap},
        }
    ]
    metric = {"name": "teacher_kl", "title": "KL", "format": ".3f", "better": "lower"}
    outcome = {"baseline": "kd", "seeds": [0, 1], "metrics": [metric], "arms": arms, "failures": {}}
    assert "a lacks seed 0: its figures are of the others" in shown(outcome, "teacher_kl")


def test_drafters_are_compared_by_the_same_command(tmp_path: Path, base: dict[str, Any]) -> None:
    drafting = {
        "job": "train-drafter",
        "target": base["teacher"],
        "drafter": {"name": "medusa", "depth": 2},
        "data": base["data"] | {"responses": {"max_new_tokens": 6}},
        "training": base["training"] | {"epochs": 4},
    }
    measured = {"training": {"eval_every": 4}}
    arms = {
        "medusa": {},
        "every_level": {"method": {"gates": []}, **measured},
        "fasteagle": {"drafter": {"name": "fasteagle", "depth": 3}},
    }
    file = asked(tmp_path, drafting, arms=arms, seeds=[0, 1], draws=20)
    assert [*JOBS["compare"].look_ahead(compare_spec(file))] == [*arms]
    outcome = compare(compare_spec(file)).read_json("comparison.json")
    assert [row["arm"] for row in outcome["arms"]] == list(arms)
    assert [each["name"] for each in outcome["metrics"]][:2] == ["tau", "tau_tree"]
    taus = []
    for seed in (0, 1):
        results = tmp_path / f"run/cells/every_level/seed-{seed}/results.json"
        taus.append(json.loads(results.read_text())["after"]["tau"])
    (row,) = (row for row in outcome["arms"] if row["arm"] == "every_level")
    assert row["figures"]["tau"] == pytest.approx(sum(taus) / 2)
    gap = row["differences"]["tau"]
    assert gap["mean"] == pytest.approx(sum(taus) / 2 - outcome["arms"][0]["figures"]["tau"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert row["cost"]["tokens"] == outcome["arms"][0]["cost"]["tokens"], "the same budget"
    assert "tau of a chain" in shown(outcome, "tau")
    assert outcome["kept_by_these_rows"] == ["every_level"]
    assert "which flatters them: every_level" in shown(outcome, "tau")
    once = (tmp_path / "run/responses/train.jsonl").read_bytes()
    cells = [file.read_bytes() for file in (tmp_path / "run").glob("cells/*/*/data/train.jsonl")]
    assert cells == 6 * [once], "generated once for all"
    assert "medusa - " in shown(outcome, "level_3"), "what only some arms have"


def test_a_mistake_in_an_arm_is_told_by_its_line(tmp_path: Path, base: dict[str, Any]) -> None:
    text = (
        "job: compare\nbase:\n"
        + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in base.items())
        + "arms:\n  kd: {}\n  odd:\n    method:\n      gates:\n        - {name: speckd, q: 3}\n"
    )
    (tmp_path / "compare.yaml").write_text(text)
    line = text.splitlines().index("        - {name: speckd, q: 3}") + 1
    with pytest.raises(UserError, match=rf"compare\.yaml:{line}: arms\.odd\.method\.gates\.0\.q"):
        read_spec(tmp_path / "compare.yaml")


def test_mistakes_in_a_base_and_in_a_grid_are_told_by_their_lines(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """All of them, whichever job the base is of."""
    drafting = {
        "job": "train-drafter",
        "targt": base["teacher"],
        "data": base["data"],
        "drafter": "medusa",
        "training": {"steps": -1},
    }
    with pytest.raises(UserError) as found:
        read_spec(asked(tmp_path, drafting, arms={"kd": {}}))
    for said in (
        "base.targt: unknown key",
        "base.target: missing field",
        "base.training.steps: must",
    ):
        assert said in found.value.cause
    assert "did you mean 'target'" in found.value.cure
    text = f"job: compare\nbase: {json.dumps(base)}\narms: {{kd: {{}}}}\n"
    text += "validation: {name: chat, path: other.jsonl}\n"
    text += "grid:\n  training.learning_rate: [0.1, -1]\n"
    (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(UserError, match=r"yaml:5: grid\.training\.learning_rate: must be greater"):
        read_spec(tmp_path / "compare.yaml")


def test_changes_replace_components_whole(base: dict[str, Any]) -> None:
    from kdcore.specs.distill import DistillSpec

    begun = DistillSpec.model_validate(
        base | {"method": {"divergence": {"name": "skew_kl", "alpha": 0.2}, "tau": 2.0}}
    )
    spec = changed(begun, {"method": {"divergence": {"name": "jsd"}}})
    assert spec.method.divergence.name == "jsd" and spec.method.tau == 2.0


RATES = {"grid": {"training.learning_rate": [1e-3, 1e-2]}}
OTHER = {"name": "chat", "path": "other.jsonl"}
FAST = {"learning_rate": 1.0}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arms": {}}, "arms is empty"),
        ({"baseline": "kv"}, "known: kd"),
        ({"seeds": [1, 1]}, "same seed twice"),
        ({"arms": {"../x": {}}}, "invalid name"),
        ({"arms": {"kd": {"seed": 3}}}, "seed cannot be set here"),
        (
            {"arms": {"kd": {"data": {"heldout": {"name": "chat"}}}}},
            "only on the same held-out rows",
        ),
        ({"grid": {"run": ["a", "b"]}}, "run cannot be set here"),
        ({"grid": {"training.learning_rate": []}}, "at least 1"),
        (
            {"grid": {"training.lr": [1], "training.lr.start": [1]}},
            "which is part of it, have values",
        ),
        (RATES, "set validation"),
        (RATES | {"validation": OTHER, "arms": {"kd": {"training": FAST}}}, "remove one of them"),
        ({"choose_by": "accuracy"}, "set grid"),
        ({"trials": 2}, "set grid"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    base: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        CompareSpec.model_validate({"job": "compare", "base": base, "arms": {"kd": {}}} | fields)


def test_a_figure_without_a_better_side_chooses_nothing() -> None:
    figures = {"tau": 1.0, "gate/speckd": 0.5}
    results = TrainingResults(after=figures, metrics=[Metric("tau", "tau", ".2f", "higher")])
    asked: Any = SimpleNamespace(choose_by="gate/speckd")
    cell: Any = SimpleNamespace(results=lambda: results)
    with pytest.raises(UserError, match=r"no 'gate/speckd' was measured\nknown: tau"):
        comparison._refuse_unmeasured(asked, cell)


def test_what_builds_the_components_is_imported_before_the_cells_are_forked(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"name": "inverted", "gate": {"name": "speckd"}}
    spec = DistillSpec.model_validate(base | {"method": {"gates": [gate]}})
    imported: list[str] = []
    processes = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(type(processes), "set_forkserver_preload", lambda _, m: imported.extend(m))
    monkeypatch.setattr(cell_process, "_begin_server", lambda: None)
    registry = installed()
    attribute = registry.attribute

    def broken(component: Component) -> Any:
        if component.name == "forward_kl":
            raise UserError("it cannot be imported", "mend it")
        return attribute(component)

    monkeypatch.setattr(registry, "attribute", broken)
    cell_process._processes(spec, registry)
    assert imported[0] == "kdcore.jobs.distill" and len(imported) == len(set(imported))
    assert {"kdcore_speckd.gate", "kdcore_baselines.gates"} < set(imported)  # the inner one too
    assert "kdcore_baselines.divergences" not in imported  # its cell will say why


def test_a_long_reason_is_told_whole(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Run:
        raise UserError("x" * 2**20, "none")

    monkeypatch.setattr("kdcore.jobs.distill.distill", fails)
    receive, send = multiprocessing.Pipe(duplex=False)
    cell = Thread(target=cell_process.carry_out_cell, args=({"job": "distill"} | base, send))
    cell.start()
    assert receive.recv() == ("failed", "x" * 2**20, "none")
    cell.join()


class AfterOneCell(Silent):
    """Interrupts a comparison when its first cell is done, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Any]:
        yield SimpleNamespace(advance=self._stop)

    def note(self, line: str) -> None:
        self.told.append(line)

    def _stop(self) -> None:
        raise KeyboardInterrupt


def test_cells_are_not_mixed_with_cells_of_other_data(tmp_path: Path, base: dict[str, Any]) -> None:
    """Neither when the rows changed since the first ones, nor when the teacher did."""
    mine = {"teacher": saved(tiny_model(), tmp_path / "teacher"), "rows": tmp_path / "rows.jsonl"}
    shutil.copy(base["data"]["train"]["path"], mine["rows"])
    source = {"name": "chat", "path": str(mine["rows"])}
    own = {"teacher": {"model": str(mine["teacher"])}, "data": {"train": source, "heldout": source}}
    small = {"evaluation": {"samples": 0}}
    spec = compare_spec(asked(tmp_path, base | own | small, arms={"kd": {}, "two": {}}, seeds=[0]))
    watcher = AfterOneCell()
    with pytest.raises(KeyboardInterrupt):
        compare(spec, progress=watcher)
    assert [line.partition(" are ")[0] for line in watcher.told] == [
        "kd, seed 0: 8 of 8 held-out rows"
    ]
    done = (tmp_path / "run/cells/kd/seed-0/results.json").read_bytes()
    before = mine["rows"].read_text()
    mine["rows"].write_text(before.replace("sat 3", "stood 3"))
    with pytest.raises(
        OtherInput, match=r"the rows of data.train changed since \S*kd/seed-0 began"
    ):
        compare(spec, resume=True)
    mine["rows"].write_text(before)
    saved(tiny_model(seed=1), mine["teacher"])
    with pytest.raises(OtherInput, match="the teacher changed"):
        compare(spec, resume=True)
    assert (tmp_path / "run/cells/kd/seed-0/results.json").read_bytes() == done
    saved(tiny_model(), mine["teacher"])
    outcome = compare(spec, resume=True).read_json("comparison.json")
    assert [row["seeds"] for row in outcome["arms"]] == [[0], [0]] and not outcome["failures"]


def test_a_comparison_of_an_older_version_goes_on(tmp_path: Path, base: dict[str, Any]) -> None:
    """Its cells measured before their training, and no spec of theirs said so."""
    fields = {"arms": {"kd": {}, "two": {}}, "seeds": [0], "draws": 10}
    small = base | {"evaluation": {"samples": 0}}
    measuring = small | {"evaluation": {"samples": 0, "before": True}}
    older = compare_spec(asked(tmp_path, measuring, **fields))
    compare(older)
    done, torn = (Run(tmp_path / f"run/cells/{arm}/seed-0") for arm in fields["arms"])
    with pytest.raises(UserError, match=r"different spec \(base\.evaluation\.before differ"):
        compare(compare_spec(asked(tmp_path, small, **fields)), resume=True)
    for spec in (tmp_path / "run").rglob("spec.yaml"):
        lines = spec.read_text().splitlines(keepends=True)
        spec.write_text("".join(line for line in lines if "before:" not in line))
    for name in ("README.md", "results.json", "cost.json"):
        torn.path(name).unlink()
    kept = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    outcome = compare(compare_spec(asked(tmp_path, small, **fields)), resume=True)
    assert not outcome.read_json("comparison.json")["failures"]
    assert kept == {path: path.read_bytes() for path in kept}
    results = [cell.read_json("results.json") for cell in (done, torn)]
    assert [bool(each["before"]) for each in results] == [True, False]
    assert results[0]["after"] == results[1]["after"] != {}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_cell_ends_with_its_comparison(
    tmp_path: Path, base: dict[str, Any], how: signal.Signals
) -> None:
    """It waits for rows that never come, until it is interrupted; then it lets go of its folder."""
    os.mkfifo(tmp_path / "rows.jsonl")
    data = base["data"] | {"train": {"name": "chat", "path": str(tmp_path / "rows.jsonl")}}
    file = asked(tmp_path, base | {"data": data}, arms={"kd": {}}, seeds=[0])
    command = [str(Path(sys.executable).with_name("kdcore")), "compare", str(file)]
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, stderr=said) as comparison,
        (tmp_path / "rows.jsonl").open("w") as rows,  # waits until the cell reads
    ):
        comparison.send_signal(how)
        code = comparison.wait()
        gone = poll()
        gone.register(rows, 0)
        assert gone.poll(600_000) == [(rows.fileno(), POLLERR)], "nobody reads any more"
    if how is signal.SIGKILL:
        assert code == -how
    else:
        assert code == 130
        assert "resume with: kdcore compare" in (tmp_path / "said").read_text()
    run = Run(tmp_path / "run/cells/kd/seed-0")
    with FileLock(run.folder / "lock", timeout=600):  # it ends after it no longer reads
        assert run.read_json("run.json")["status"] == "interrupted"


def test_ctrl_c_while_the_cells_libraries_are_imported_is_told_of_once(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """It reaches all processes of the terminal, that which imports for the cells too."""
    source = """
        import os, signal, sys
        if sys.argv[0] == "-c":  # not in the comparison itself
            os.killpg(0, signal.SIGINT)
        class Gate: ...
    """
    site = tmp_path / "site"
    fake.install(site, "slow", fake.component("slow", build="slow_gate:Gate"))
    (site / "slow_gate.py").write_text(dedent(source))
    file = asked(tmp_path, base | {"method": {"gates": ["slow"]}}, arms={"kd": {}}, seeds=[0])
    done = subprocess.run(
        [Path(sys.executable).with_name("kdcore"), "compare", file],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(site)},
        start_new_session=True,
    )
    told = f"interrupted: go on with: kdcore compare {file} --resume\n"
    assert (done.returncode, done.stderr) == (130, told)


@pytest.mark.parametrize("values", [[None, 10], [[], ["speckd"]], ["b", "a"], [{"a": 1}, {}]])
def test_what_has_no_order_has_no_edge(values: list[Any]) -> None:
    grid = [{"fields": {"a.b": value}, "figures": {}} for value in values]
    arm = {"arm": "kd", "seeds": [], "grid": grid, "chosen": grid[0]["fields"]}
    metric = {"name": "a", "title": "a", "format": ".1f", "better": "lower"}
    outcome = {"metrics": [metric], "baseline": "kd", "seeds": [0], "kept_by_these_rows": []}
    said = shown(outcome | {"arms": [arm], "failures": {}}, "a")
    assert said.endswith(f"kd: a.b {values[0]}")


def test_a_grid_of_too_many_points_is_refused_before_any_is_made(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcore.specs.compare.points", lambda grid: pytest.fail("made"))
    values = list(range(100))
    grid = {f"training.{field}": values for field in ("steps", "warmup", "eval_every", "clip")}
    with pytest.raises(ValidationError, match="the grid has 100,000,000 combinations"):
        CompareSpec.model_validate(
            {"job": "compare", "base": base, "arms": {"a": {}}} | {"grid": grid}
        )


def test_responses_are_kept_where_the_spec_says(tmp_path: Path, base: dict[str, Any]) -> None:
    asked_for = {"by": "teacher", "max_new_tokens": 3, "folder": str(tmp_path / "kept")}
    data = base["data"] | {"responses": asked_for}
    file = asked(tmp_path, base | {"data": data}, arms={"kd": {}}, seeds=[0], draws=10)
    compare(compare_spec(file))
    assert (tmp_path / "kept" / "train.jsonl").exists()
    assert not (tmp_path / "run" / "responses").exists()
