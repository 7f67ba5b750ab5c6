"""Shares of a comparison's cells, which several machines run, give what one machine gives."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore import library
from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.jobs.comparison.compare import compare
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput, refuse_mixed
from kdcore.runs.progress import Silent
from kdcore.specs.compare import CompareSpec
from kdcore.specs.distill import DistillSpec
from kdcore.training.rows import settle_rows
from tests.fixtures.processes.forked import KDCORE, Begun
from tests.kdcore.jobs.comparison.comparisons import asked, compare_spec

ARMS: dict[str, Any] = {"kd": {}, "speckd": {"method": {"gates": ["speckd"]}}}
TORN: dict[str, Any] = {"student": {"layers": [0, 99]}}


def spec_in(folder: Path, base: dict[str, Any], **fields: Any) -> CompareSpec:
    folder.mkdir()
    small = base | {"evaluation": {"samples": 0}}
    return compare_spec(asked(folder, small, **{"arms": ARMS, "seeds": [0], "draws": 10} | fields))


def found(run: Run) -> tuple[Any, dict[str, bytes]]:
    """The figures of a comparison, without costs, and the weights of its cells' students.

    A cell whose process was told to end has a checkpoint more, of the step at which it ended.
    """
    outcome = run.read_json("comparison.json")
    for arm in outcome["arms"]:
        arm.pop("cost", None)
    weights = sorted(run.folder.glob("cells/**/model/model.safetensors"))
    assert weights
    return outcome, {str(path.relative_to(run.folder)): path.read_bytes() for path in weights}


def ran(run: Run) -> set[str]:
    """The cells that are done, by the folders of their arm."""
    cells = run.folder / "cells"
    return {str(path.parent.relative_to(cells)) for path in cells.rglob("cost.json")}


class Told(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_shares_choose_points_and_match_controls_as_one_machine_does(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    fields = {
        "grid": {"training.learning_rate": [1e-6, 1e-2]},
        "validation": base["data"]["heldout"] | {"limit": 3},
        "arms": ARMS | {"torn": TORN},  # its trials fail, and nothing waits for them
        "controls": True,
    }
    spec, told = spec_in(tmp_path / "shared", base, **fields), Told()
    run = compare(spec, share=(1, 2), progress=told)
    assert ran(run) == {"kd/point-0/seed-1", "speckd/point-0/seed-1"}
    assert "share 1/2 has ended, and cells of other shares have not (kd, point 1" in told.lines[-1]
    assert run.status == "running" and not run.results
    compare(spec, share=(2, 2))
    assert {name for name in ran(run) if name.endswith("seed-0")} == {"speckd/point-1/seed-0"} | {
        f"speckd+{control}/point-1/seed-0" for control in ("random", "uniform", "inverted")
    }, "the trials of both shares have ended, so its own cells come, with their controls"
    assert not run.results
    library.run(spec, share=(1, 2))
    assert run.status == "done"
    assert found(run) == found(compare(spec_in(tmp_path / "one", base, **fields)))


def test_shares_at_once_in_one_folder_and_one_of_them_is_killed(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    fields = {"seeds": [0, 1], "arms": {"kd": {}, "two": {"method": {"tau": 2}}}}
    slow = base | {"training": base["training"] | {"steps": 8, "save_every": 2}}
    spec = spec_in(tmp_path / "shared", slow, **fields)
    file, run = tmp_path / "shared/compare.yaml", Run(spec.run, planned=True)
    shares = [Begun("-c", KDCORE, "compare", file, "--share", f"{n}/2") for n in (1, 2)]
    while not [*(run.folder / "cells/kd/seed-0").glob("checkpoint-*")]:
        assert shares[0].process.is_alive()
        time.sleep(0.05)
    shares[0].send(signal.SIGKILL)
    ended = [share.ended() for share in shares]
    assert ended[0].returncode == -signal.SIGKILL and ended[1].returncode == 0, ended[1].stderr
    assert "share 2/2 has ended" in " ".join(ended[1].stderr.split()) and not ended[1].stdout
    last = Begun("-c", KDCORE, "compare", file, "--share", "1/2").ended()
    assert last.returncode == 0 and "two" in last.stdout, last.stderr
    assert found(run) == found(compare(spec_in(tmp_path / "one", slow, **fields)))


def test_the_cells_of_several_folders_are_copied_together(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    specs = [spec_in(tmp_path / name, base) for name in ("first", "second")]
    runs = [compare(spec, share=(n, 2)) for n, spec in enumerate(specs, start=1)]
    assert [ran(run) for run in runs] == [{"kd/seed-0"}, {"speckd/seed-0"}]
    shutil.copytree(runs[1].folder / "cells", runs[0].folder / "cells", dirs_exist_ok=True)
    assert found(compare(specs[0], resume=True)) == found(compare(spec_in(tmp_path / "one", base)))

    theirs = runs[0].path("cells/speckd/seed-0")
    made = (theirs / "spec.yaml").read_text()
    other = made.replace("tau: 1.0", "tau: 2.0")
    assert other != made
    (theirs / "spec.yaml").write_text(other)
    told = kdcore("compare", tmp_path / "first/compare.yaml", "--resume")
    said = " ".join(told.stderr.split())
    assert told.returncode == 2
    assert f"{theirs} was made with a different spec; changed: method.tau" in said
    assert "fix: give all machines one spec" in said and "rerun the command" in said
    (theirs / "spec.yaml").write_text(made)

    inputs = runs[0].path("cells/speckd/seed-0/run.json")
    facts = json.loads(inputs.read_text())
    facts["inputs"]["the teacher"]["digest"] = "0" * 64
    inputs.write_text(json.dumps(facts))
    with pytest.raises(OtherInput, match=r"the teacher of \S*speckd/seed-0 differs from that of"):
        compare(specs[0], resume=True)


def test_responses_that_machines_keep_in_folders_of_their_own_are_compared(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcore.training.rows.digest_of", "the digest of {}".format)
    runs = [Run(tmp_path / name, planned=True) for name in ("one", "other")]
    for run in runs:
        run.folder.mkdir()
        responses = {"by": "teacher", "folder": str(run.folder / "responses")}
        data = base["data"] | {"responses": responses}
        spec = DistillSpec.model_validate(base | {"run": str(run.folder), "data": data})
        rows: Any = SimpleNamespace(encoded=SimpleNamespace(rows=run.folder.name), generated=None)
        teacher: Any = SimpleNamespace(digest="teacher")
        settle_rows(run, "train", spec, rows, teacher)
    with pytest.raises(OtherInput, match=r"the rows of data\.train of \S*other differs"):
        refuse_mixed(runs)


def test_a_failed_cell_is_repeated_by_resume_and_not_by_a_share(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    spec = spec_in(tmp_path / "run", base, arms={"kd": {}, "torn": TORN})
    run = compare(spec, share=(2, 2))
    told = Told()
    compare(spec, share=(2, 2), progress=told)
    assert not any("failed" in line for line in told.lines)
    compare(spec, share=(1, 2))
    assert "99" in run.read_json("comparison.json")["failures"]["torn, seed 0"]
    compare(spec, resume=True, progress=told)
    assert any("torn, seed 0 failed" in line for line in told.lines)


def test_what_a_share_refuses(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    spec = spec_in(tmp_path / "run", base)
    file = tmp_path / "run/compare.yaml"
    assert "--share 3/2 is not a share" in kdcore("compare", file, "--share", "3/2").stderr
    both = kdcore("compare", file, "--share", "1/2", "--overwrite")
    assert both.returncode == 2 and "fix: remove --overwrite" in " ".join(both.stderr.split())
    with pytest.raises(UserError, match=r"share=\(3, 2\) is not a share"):
        compare(spec, share=(3, 2))
    with pytest.raises(UserError, match=r"distill cannot be divided.*\n.*divided: compare"):
        library.run({"job": "distill", **base, "run": str(tmp_path / "d")}, share=(1, 2))
    assert not Run(spec.run, planned=True).folder.exists()


def test_cells_that_other_processes_run_are_left_to_them(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    spec, told = spec_in(tmp_path / "run", base), Told()
    Run.open(spec.run, spec, installed(), shared=True)
    cell = Run(spec.run / "cells/kd/seed-0", planned=True)
    with cell._locked():
        run = compare(spec, share=(1, 1), progress=told)
        assert ran(run) == {"speckd/seed-0"} and "(kd, seed 0)" in told.lines[-1]
        whole = kdcore("compare", tmp_path / "run/compare.yaml", "--resume")
        said = " ".join(whole.stderr.split())
        assert whole.returncode == 2 and "another process runs kd, seed 0" in said
        assert "--resume; or run a share (--share N/M)" in said
        cell._held.release()
    assert found(compare(spec, share=(1, 1)))[0]["failures"] == {}
