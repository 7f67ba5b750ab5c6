"""The public API: what it offers, what importing it costs, and that its page documents it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field
from torch import Tensor

import kdcore
import kdcore.decoding
import kdcore_baselines
import kdcore_deepkd
import kdcore_speckd
from kdcore.components.registry import installed
from kdcore.testing import suite_of
from tests.fixtures.json_lines import write_lines
from tests.fixtures.pages import BLOCKS, ROOT
from tests.kdcore.jobs.train_drafter.test_train_drafter import spec_of as drafter_spec  # noqa: F401
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import saved, tiny_model

PAGE = ROOT / "docs" / "reference" / "api.md"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def spec(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A distillation in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), CHATS)
    source = {"name": "chat", "path": "rows.jsonl"}
    return {
        "job": "distill",
        "run": "runs/distill",
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source | {"limit": 4}},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 2},
        "evaluation": {"samples": 0},
    }


class SureParams(kdcore.Params):
    least: float = Field(0.5, description="smallest probability of a kept position")


class Sure:
    """Weight 1 where the teacher's best token is as probable as this."""

    def __init__(self, params: SureParams, context: kdcore.BuildContext) -> None:
        self.least = params.least

    def __call__(self, batch: kdcore.LogitBatch) -> Tensor:
        return (batch.teacher.softmax(-1).amax(-1) >= self.least).to(batch.student.dtype)


def gate(**changes: Any) -> kdcore.Component:
    said: dict[str, Any] = {"kind": "gate", "name": "sure", "build": Sure, "params": SureParams}
    return kdcore.Component(**said | {"summary": "for a test", "source": "none"} | changes)


def test_the_page_documents_every_name_by_group_in_order_with_an_example() -> None:
    documented: list[str] = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        names = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        assert names == sorted(names) and "```python\n" in section, section.splitlines()[0]
        documented += names
    assert documented == kdcore.__all__


LAZY = [kdcore, kdcore.decoding, kdcore_baselines, kdcore_deepkd, kdcore_speckd]


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_type_checkers_see_what_is_loaded(package: ModuleType) -> None:
    """The imports under TYPE_CHECKING are the table of the lazy ones."""
    face = ast.parse(Path(str(package.__file__)).read_text())
    (switch,) = [node for node in face.body if isinstance(node, ast.If)]
    seen = {
        name.name: node.module
        for node in switch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    table = {
        name: resolve_name(module, package.__name__)
        for module, names in package._MODULES.items()
        for name in names.split()
    }
    assert seen == table
    assert sorted(seen) == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in seen)


@pytest.mark.parametrize("name", kdcore.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(kdcore, name) is not None
    assert name in dir(kdcore)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kdcore' has no attribute 'distil'"):
        kdcore.distil  # noqa: B018


def loaded_after(statement: str) -> set[str]:
    """The top-level packages, and kdcore's own modules, in a fresh interpreter."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    modules = json.loads(done.stdout)
    return {m.partition(".")[0] for m in modules} | {m for m in modules if m.startswith("kdcore")}


def test_importing_it_loads_nothing_else() -> None:
    new = loaded_after("import kdcore")
    assert not new & {"torch", "transformers", "pydantic", "pluggy", "kdcore_baselines"}
    assert {m for m in new if m.startswith("kdcore.")} == {
        "kdcore.components",
        "kdcore.components.exports",
    }


def test_declaring_and_reading_a_spec_load_no_torch() -> None:
    names = "Component, GateChoice, Params, Run, Schedule, hookimpl, read_spec, registry_with, run"
    new = loaded_after(f"from kdcore import {names}")
    assert "kdcore.library" in new
    assert not new & {"torch", "transformers"}


def test_a_spec_is_a_path_a_mapping_or_a_model(spec: dict[str, Any]) -> None:
    Path("spec.yaml").write_text(json.dumps(spec))
    model = kdcore.read_spec(spec, "training.steps=3")
    assert spec["training"]["steps"] == 2
    assert kdcore.read_spec(model) is model
    again = kdcore.read_spec(model, "training.batch_size=2")
    assert again.training.model_dump() == model.training.model_dump() | {"batch_size": 2}  # type: ignore[attr-defined]
    for path in ("spec.yaml", Path("spec.yaml")):
        assert kdcore.read_spec(path, "training.steps=3") == model


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"training": {"steps": "many"}}, r"^the spec: training.steps: "),
        ({"jb": "distill"}, r"^the spec: jb: "),
        ({"job": "distil"}, r"^the spec: job: unknown job"),
    ],
)
def test_a_mapping_s_mistakes_are_told(
    spec: dict[str, Any], change: dict[str, Any], cause: str
) -> None:
    with pytest.raises(kdcore.UserError, match=cause):
        kdcore.run(spec | change)


def test_a_job_is_checked_run_resumed_and_drawn(spec: dict[str, Any]) -> None:
    plan = kdcore.check(spec)
    assert (plan.job, plan.training.steps, plan.facts["steps"]) == ("distill", 2, 2)
    assert plan.spec == kdcore.read_spec(spec) and list(plan.trainings) == ["distill"]
    run = kdcore.run(spec)
    assert run.folder == Path("runs/distill").resolve()
    assert run.status == "done" and repr(run) == f"Run('{run.folder}', done)"
    assert run.results["after"]["teacher_kl"] < run.results["before"]["teacher_kl"]
    with pytest.raises(kdcore.UserError, match="already contains a run"):
        kdcore.run(spec)
    assert kdcore.run(spec, resume=True).results == run.results
    assert kdcore.Run("runs/distill").results == run.results
    assert kdcore.report(run) == run.folder / "report.html"
    assert kdcore.report(run, "runs/distill", out="both.html").is_file()
    measured = kdcore.evaluate(run)
    assert measured.figures["teacher_kl"] == pytest.approx(run.results["after"]["teacher_kl"])
    before = run.results
    assert kdcore.run(spec, "training.steps=1", overwrite=True).results != before


def test_what_cannot_be_is_refused(spec: dict[str, Any], teacher: Path) -> None:
    with pytest.raises(kdcore.UserError, match="exclude each other"):
        kdcore.run(spec, resume=True, overwrite=True)
    measured = {
        "job": "evaluate",
        "model": {"model": str(teacher)},
        "heldout": spec["data"]["train"],
    }
    with pytest.raises(kdcore.UserError, match="does not write a run folder"):
        kdcore.run(measured)
    with pytest.raises(kdcore.UserError, match="job 'evaluate' does not have a check"):
        kdcore.check(measured)
    with pytest.raises(kdcore.UserError, match="names the job distill, not evaluate"):
        kdcore.evaluate(spec)
    with pytest.raises(kdcore.UserError, match=r"^dtype: "):
        kdcore.load_model(teacher, dtype="float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("opened", [kdcore.Run, kdcore.evaluate, kdcore.report, kdcore.table])
def test_a_folder_without_a_run_is_told_with_the_runs_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {"runs/godd": ("does not exist", "'runs/good'"), "nothing": ("does not exist", "runs/d")}
    said |= {"runs": ("is not a run folder", "runs/good"), "empty": ("is not a run folder", "")}
    said |= {"runs/good/model": ("is not a run folder", "e.g. runs/good")}
    said |= {"torn": ("run.json is damaged", "restore that file")}
    for folder in ("runs/good/model", "empty", "torn"):
        Path(folder).mkdir(parents=True)
    Path("runs/good/run.json").write_text('{"versions": {"kdcore": "0.1.0"}}')
    Path("torn/run.json").write_text('{"versions": {')
    Path("torn/spec.yaml").write_text("job: distill")
    for folder, (cause, cure) in said.items():
        with pytest.raises(kdcore.UserError, match=f"^{folder}.*{cause}") as wrong:
            opened(folder)
        assert cure in wrong.value.cure and "init" not in wrong.value.cure


def test_messages_name_the_arguments_of_the_function_that_was_called(spec: dict[str, Any]) -> None:
    Path("runs").mkdir()
    Path("runs/distill").write_text("in the way")
    Path("report.html").write_text("in the way")
    said = []
    for call in (
        lambda: kdcore.run(spec),
        lambda: kdcore.run(spec, "training.steps"),
        lambda: kdcore.run(spec, "training.steps=many"),
        lambda: kdcore.report("runs/a", "runs/b"),
    ):
        with pytest.raises(kdcore.UserError) as wrong:
            call()
        said.append((wrong.value.cause, wrong.value.cure))
    assert not [each for each in said if "--" in " ".join(each)]
    assert said[0][1] == "choose another run folder (run=FOLDER)"
    assert said[1] == (
        "the override training.steps: not an assignment",
        "write the override training.steps=100",
    )
    assert said[2][0].startswith("the override training.steps=many: training.steps: ")
    assert said[3][1] == "name another file (out=FILE), or replace it (overwrite=True)"


def test_a_comparison_s_plan_has_each_arm(spec: dict[str, Any]) -> None:
    base = {key: value for key, value in spec.items() if key not in ("job", "run")}
    plan = kdcore.check(
        {"job": "compare", "base": base, "arms": {"a": {}, "b": {"method": {"tau": 2}}}}
    )
    assert list(plan.trainings) == list(plan.facts) == ["a", "b"]
    with pytest.raises(kdcore.UserError, match="the job compare has 2 trainings"):
        _ = plan.training


def test_a_gate_of_this_program_trains_beside_installed_ones(spec: dict[str, Any]) -> None:
    registry = kdcore.registry_with(gate())
    spec["method"] = {"gates": ["speckd", {"name": "sure", "least": 0.01}]}
    run = kdcore.run(spec, registry=registry)
    logged = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert {"acceptance/speckd", "acceptance/sure"} <= logged[0].keys()
    assert run.spec()["method"]["gates"][1] == {"name": "sure", "least": 0.01}
    assert "this program==(not installed)" in run.read_json("run.json")["plugins"].values()
    with pytest.raises(kdcore.UserError, match="unknown gate 'sure'"):
        kdcore.read_spec(spec)
    assert "sure" not in installed().names("gate")


def test_the_kit_tests_a_gate_of_this_program() -> None:
    component = gate()
    suite = suite_of(component, registry=kdcore.registry_with(component))
    checks = [name for name in dir(suite) if name.startswith("test_")]
    assert checks
    for name in checks:
        getattr(suite(), name)()


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"name": "speckd"}, "gate 'speckd' is declared by both kdcore .* and this program"),
        ({"kind": "gat"}, "unknown kind 'gat'"),
        ({"build": 3}, "must have the form 'module:attribute', or be callable"),
        ({"params": dict}, "must be a pydantic model"),
    ],
)
def test_a_bad_component_is_refused_and_nothing_is_left_of_it(
    changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(kdcore.UserError, match=cause):
        kdcore.registry_with(gate(**changes))
    assert installed().component("gate", "speckd")
    assert kdcore.registry_with(gate()).component("gate", "sure").place == f"{__name__}:Sure"


def test_a_comparison_refuses_what_its_cells_would_not_find(spec: dict[str, Any]) -> None:
    base = {key: value for key, value in spec.items() if key not in ("job", "run")}
    arms = {"plain": {}, "mine": {"method": {"gates": ["sure"]}}}
    asked = {"job": "compare", "run": "runs/compare", "base": base, "arms": arms}
    with pytest.raises(kdcore.UserError, match="the gate 'sure' is not installed; each cell"):
        kdcore.run(asked, registry=kdcore.registry_with(gate()))
    assert not Path("runs/compare").exists()


EXAMPLES = [block for block in BLOCKS if block.page == PAGE and block.language == "python"]


def test_the_page_s_examples_run_in_order(
    spec: dict[str, Any], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that has what they name: a spec, a target, and a drafter trained for it."""
    Path("spec.yaml").write_text(json.dumps(spec))
    Path("path/to").mkdir(parents=True)
    Path("path/to/model").symlink_to(teacher)
    kdcore.run(
        {
            "job": "train-drafter",
            "run": "runs/drafter",
            "target": {"model": "path/to/model"},
            "drafter": {"name": "medusa", "depth": 2},
            "data": {"train": spec["data"]["train"], "max_length": 64},
            "training": {"batch_size": 4, "steps": 1},
        }
    )
    for block in EXAMPLES:
        exec(compile(block.text, str(block), "exec", dont_inherit=True), {"__name__": "example"})  # noqa: S102
    assert kdcore.Run("runs/large_margin").status == "done"
