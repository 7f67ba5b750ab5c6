"""Each cell in a process of its own: its environment, its failures, its end."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import POLLERR, poll
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from kdcore.components.component import Component
from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.jobs.comparison import cell_process
from kdcore.jobs.comparison.compare import compare
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.runs.progress import Silent
from kdcore.specs.distill import DistillSpec
from tests.fixtures import fake_distributions as fake
from tests.fixtures.processes.forked import KDCORE, Begun
from tests.kdcore.jobs.comparison.comparisons import asked, compare_spec
from tests.kdcore.jobs.comparison.test_comparable_jobs import source, spec_of
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_what_builds_the_components_is_imported_before_the_cells_are_forked(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"name": "inverted", "gate": {"name": "speckd"}}
    spec = DistillSpec.model_validate(base | {"method": {"gates": [gate]}})
    imported: list[str] = []
    processes = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(type(processes), "set_forkserver_preload", lambda _, m: imported.extend(m))
    monkeypatch.setattr(cell_process, "_begin_server", lambda: None)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # a command sets it
    registry = installed()
    attribute = registry.attribute

    def broken(component: Component) -> Any:
        if component.name == "forward_kl":
            raise UserError("it cannot be imported", "mend it")
        return attribute(component)

    monkeypatch.setattr(registry, "attribute", broken)
    cell_process._processes(spec, registry)
    assert imported[0] == "kdcore.jobs.distill" and len(imported) == len(set(imported))
    assert {"kdcore_speckd.gate", "kdcore_baselines.method.gates"} < set(
        imported
    )  # the inner one too
    assert "kdcore_baselines.method.divergences" not in imported  # its cell will say why


def test_cells_do_not_run_the_script_that_compares(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook that is saved as a script does not guard its lines by the name of its module."""
    script = tmp_path / "notebook.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    file = asked(tmp_path, base | {"training": {"steps": 1}}, arms={"kd": {}}, seeds=[0])
    assert compare(compare_spec(file)).status == "done"
    assert sys.modules["__main__"] is main and not (tmp_path / "ran").exists()


def test_only_the_reasons_of_the_baseline_are_told_and_each_once(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = asked(tmp_path, base, arms={"kd": {}, "other": {}}, seeds=[0, 1])

    def fails(spec: Any, *given: Any) -> cell_process.Failed:
        return cell_process.Failed(UserError(f"mistake of {Path(spec.run).parent.name}", "none"))

    monkeypatch.setattr(cell_process, "run_cell", fails)
    with pytest.raises(UserError) as told:
        compare(compare_spec(file))
    assert told.value.cause == "every cell of the baseline 'kd' failed: mistake of kd"
    rerun = "rerun with resume=True if the spec is unchanged, else with overwrite=True"
    assert told.value.cure == f"none; {rerun}"


def test_a_process_that_is_not_the_first_leaves_no_file_beside_a_cell(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """Another one writes the cell, and its failure and traceback if it fails."""
    asked = {"job": "distill", "run": str(tmp_path / "cells/seed-0"), **base}
    Run.open(tmp_path / "cells/seed-0", DistillSpec.model_validate(asked), installed())
    with FileLock(tmp_path / "cells/seed-0/lock"):
        told: list[Any] = []
        cell_process.carry_out_cell(asked, told.append)
    assert "another process" in told[-1].error.cause and 'File "' in told[-1].traceback
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["seed-0"]


def test_a_long_reason_is_told_whole(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **named: Any) -> Run:
        raise UserError("x" * 2**20, "none")

    monkeypatch.setattr("kdcore.jobs.distill.distill", fails)
    receive, send = multiprocessing.Pipe(duplex=False)
    asked = {"job": "distill", "run": str(tmp_path / "run"), **base}
    cell = Thread(target=cell_process.carry_out_cell, args=(asked, send.send))
    cell.start()
    told = receive.recv()
    assert (told.error.cause, told.error.cure) == ("x" * 2**20, "none")
    cell.join()


def test_a_cell_has_the_environment_of_the_moment_it_starts(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What forks the cells started with the environment of an earlier one."""
    own = {"teacher": {"model": "~/teacher"}, "evaluation": {"samples": 0}}
    (tmp_path / "teacher").symlink_to(base["teacher"]["model"])
    reasons = []
    for home in (tmp_path / "empty", tmp_path):
        monkeypatch.setenv("HOME", str(home))
        spec = DistillSpec.model_validate(base | own | {"run": str(tmp_path / "run")})
        reasons.append(cell_process.run_cell(spec, installed(), lambda line: None))
    assert reasons[0] and "~/teacher" in reasons[0].error.cause
    assert reasons[1] is None


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
        OtherInput, match=r"the rows of data.train changed since \S*kd/seed-0 started"
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
    with pytest.raises(UserError, match=r"different spec; changed: base\.evaluation\.before"):
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
    comparison = Begun("-c", KDCORE, "compare", file)
    with (tmp_path / "rows.jsonl").open("w") as rows:  # waits until the cell reads
        comparison.send(how)
        done = comparison.ended()
        gone = poll()
        gone.register(rows, 0)
        assert gone.poll(600_000) == [(rows.fileno(), POLLERR)], "nobody reads any more"
    if how is signal.SIGKILL:
        assert done.returncode == -how
    else:
        assert done.returncode == 130
        assert "resume with: kdcore compare" in done.stderr
    run = Run(tmp_path / "run/cells/kd/seed-0")
    with FileLock(run.folder / "lock", timeout=600):  # it ends after it no longer reads
        assert run.read_json("run.json")["status"] == "interrupted"


def test_ctrl_c_while_the_cells_libraries_are_imported_is_told_of_once(
    tmp_path: Path, site: Path
) -> None:
    """It reaches all processes of the terminal, that which imports for the cells too."""
    interrupted = """
import os, signal
if os.getpid() != os.getsid(0):  # not in the comparison itself
    os.killpg(0, signal.SIGINT)
"""
    fake.install(site, "fit-plugin", source() + interrupted)
    file = tmp_path / "compare.yaml"
    file.write_text(json.dumps(spec_of(tmp_path)))
    in_a_session_of_its_own = f"import os; os.setsid(); {KDCORE}"
    begun = Begun(
        *("-c", in_a_session_of_its_own, "compare", file),
        env={"PYTHONPATH": str(site)},
        own_server=True,
    )
    done = begun.ended()
    told = f"interrupted: resume with: kdcore compare {file} --resume\n"
    assert (done.returncode, done.stderr) == (130, told)


def test_a_cell_that_fails_tells_the_line_that_set_its_field(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    """A line of an arm, of a value of the grid, or of the base."""
    small = base | {"training": {"steps": 1}, "evaluation": {"samples": 0}}
    spec = f"job: compare\nrun: {tmp_path / 'run'}\nseeds: [0]\narms:\n  kd: {{}}\n  other:\n"
    spec += "    data:\n      train: {name: chat, path: nowhere.jsonl}\n"
    spec += f"validation: {json.dumps(base['data']['heldout'] | {'limit': 2})}\n"
    spec += "grid:\n  method.tau: [1]\n  student.layers:\n    - [0, 2]\n    - [0, 99]\n"
    file = tmp_path / "compare.yaml"
    file.write_text(f"{spec}base: {json.dumps(small)}\n")
    told = kdcore("compare", file)
    assert told.returncode == 0, told.stderr
    said = " ".join(told.stderr.split())
    assert f"kd, point 1, seed 1 failed: {file}:14: grid.student.layers.1: " in said
    assert f"other, point 0, seed 1 failed: {file}:8: arms.other.data.train" in said
    assert said.count("failed: ") == 3
    assert "fix: use indices from 0 to 3" in said
    failures = json.loads((tmp_path / "run/comparison.json").read_text())["failures"]
    assert all(str(file) in reason for reason in failures.values())
    assert all(reason.count("\n  fix: ") == 1 for reason in failures.values())

    wrong = small | {"teacher": {"model": str(tmp_path / "empty")}}
    (tmp_path / "empty").mkdir()
    line = spec.count("\n") + 2
    file.write_text(f"{spec}base:\n  teacher: {json.dumps(wrong.pop('teacher'))}\n")
    with file.open("a") as more:
        more.writelines(f"  {name}: {json.dumps(each)}\n" for name, each in wrong.items())
    told = kdcore("compare", file, "--out", tmp_path / "second", "--set", "arms.other={}")
    assert told.returncode == 2
    assert f"'kd' failed: {file}:{line}: base.teacher" in " ".join(told.stderr.split())


FAILS = """
def fail(spec):
    from kdcore.errors import UserError

    try:
        {}["the first cause"]
    except KeyError as fault:
        if spec.seed == 0:
            raise UserError("the table is empty", "fill it") from fault
        raise
"""


def test_a_failed_cell_tells_its_cure_and_keeps_its_traceback(tmp_path: Path, site: Path) -> None:
    """In the process that compares only the message is known, and nobody sees that of the cell."""
    begun = "    run = Run.open("
    fake.install(site, "fit-plugin", source().replace(begun, f"    fail(spec)\n{begun}") + FAILS)
    file = tmp_path / "compare.yaml"
    file.write_text(json.dumps(spec_of(tmp_path, arms={"kd": {}})))
    done = Begun("-c", KDCORE, "compare", file, env={"PYTHONPATH": str(site)}, own_server=True)
    ended = done.ended()
    cells = tmp_path / "run/cells/kd"
    said = ended.stderr.splitlines()
    assert ended.returncode == 2
    for seed, cause, cure in (
        (0, "the table is empty", "fill it"),
        (
            1,
            "internal error in fit-plugin 1.0: KeyError: 'the first cause'",
            "report its traceback",
        ),
    ):
        lines = [f"kd, seed {seed} failed: {cause}", f"  fix: {cure}"]
        lines.append(f"  traceback: {cells / f'seed-{seed}.traceback.txt'}")
        at = said.index(lines[0])
        assert said[at : at + 3] == lines
        kept = (cells / f"seed-{seed}.traceback.txt").read_text()
        assert 'File "' in kept and "KeyError: 'the first cause'" in kept, "the first one too"
    assert said[-2:] == [
        "error: every cell of the baseline 'kd' failed: the table is empty; "
        "internal error in fit-plugin 1.0: KeyError: 'the first cause'",
        "  fix: fill it; report its traceback; rerun with --resume if the spec is unchanged, else "
        "with --overwrite",
    ]
