"""A plugin package of somebody else's: pip installs it, and it is found and used beside ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.fixtures.clean_environment import INSTALL, Python, environment
from tests.fixtures.pages import ROOT
from tests.fixtures.processes.forked import KDCORE
from tests.tiny.tiny_chat_models import saved, tiny_model

EXAMPLE = ROOT / "examples" / "plugins" / "margin_gate"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs Python in an environment that has the plugin."""
    run = environment(tmp_path_factory.mktemp("environment"))
    before = fingerprint()
    run(*INSTALL, EXAMPLE)
    assert fingerprint() == before, "installing the plugin changed the project"
    return run


def fingerprint() -> dict[Path, str]:
    """What every file of the project holds that an installation might have written to."""
    folders = [ROOT / name for name in ("kdcore", "plugins", "cli", "docs", "examples")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "__pycache__" not in path.parts  # other tests run meanwhile
    }


def test_it_is_listed_with_its_distribution(python: Python) -> None:
    listed = json.loads(python("-c", KDCORE, "plugins", "list", "--json"))
    assert listed["problems"] == []
    (margin,) = [entry for entry in listed["components"] if entry["name"] == "margin"]
    assert (margin["distribution"], margin["version"]) == ("margin-gate", "0.3.0")
    assert {"kdcore", "margin-gate"} <= {entry["distribution"] for entry in listed["components"]}


def test_it_is_shown_with_its_parameters_and_licence(python: Python) -> None:
    shown = json.loads(python("-c", KDCORE, "plugins", "show", "margin", "--json"))
    assert shown["licence"] == "MIT"
    assert [parameter["name"] for parameter in shown["parameters"]] == ["least", "floor"]
    assert "log p(first)" in shown["docs"]
    assert "margin-gate 0.3.0" in python("-c", KDCORE, "plugins", "show", "margin")


def test_it_is_one_of_the_choices_in_the_schema(python: Python) -> None:
    schema = json.loads(python("-c", KDCORE, "schema"))
    assert schema["$defs"]["gate.margin"]["properties"]["least"]["default"] == 1.0


def test_it_is_not_in_the_project_itself() -> None:
    from kdcore.components.registry import installed

    assert "margin" not in installed().names("gate")


def test_its_spec_composes_it_with_ours(python: Python) -> None:
    """The spec's method: two optimizer steps over each kind of rows, and another of each part."""
    python(
        "-c",
        """
from pathlib import Path
from kdcore.specs.reading.file import read_spec
from tests.kdcore.training.test_composition import ROWS, steps

spec = read_spec(Path("examples/plugins/margin_gate/spec.yaml"))
method = spec.method.model_dump(mode="json")
assert [gate["name"] for gate in method["gates"]] == ["speckd", "margin"]
others = {"divergence": "taid", "momentum": "deepkd", "terms": {"task": 0.5}}
inverted = {"gates": [{"name": "inverted", "gate": {"name": "margin", "floor": 0.2}}]}
for rows in ROWS.values():
    for change in ({}, others, inverted):
        steps(method | change, *rows)
""",
        cwd=ROOT,
    )


def test_a_run_with_it_leaves_its_figures_and_its_version(python: Python, tmp_path: Path) -> None:
    """The example's spec on a tiny teacher, from the command line to the run folder."""
    run, teacher = tmp_path / "run", saved(tiny_model(), tmp_path / "teacher")
    small = {
        "teacher.model": teacher,
        "student.layers": [0, 2],
        "data.train.limit": 4,
        "data.heldout.limit": 2,
        "data.responses.max_new_tokens": 6,
        "training.steps": 2,
        "evaluation.samples": 1,
        "evaluation.sample_tokens": 4,
    }
    sets = [word for field, value in small.items() for word in ("--set", f"{field}={value}")]
    python("-c", KDCORE, "distill", EXAMPLE / "spec.yaml", *sets, "--out", run, "--quiet")
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "done"
    assert facts["plugins"]["margin-gate:margin"] == "margin-gate==0.3.0"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= step["acceptance/margin"] <= 1 for step in steps if "loss" in step)
    assert {"gate/speckd", "gate/margin"} <= json.loads((run / "results.json").read_text())[
        "after"
    ].keys()


def test_its_own_tests_pass(python: Python) -> None:
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE)
    summary = said.splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary
