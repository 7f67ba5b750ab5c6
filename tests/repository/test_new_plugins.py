"""``kdcore plugins new`` and ``check``: packages of each kind, installed and held to the kit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kdcore import Component, registry_with
from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.testing import suite_of
from kdcore.testing.suite import results
from kdcore_cli.plugin_authoring.plugin_check import show_results
from kdcore_cli.plugin_authoring.plugin_package import EXAMPLES, write_package
from tests.fixtures.clean_environment import INSTALL, Python, environment
from tests.fixtures.processes.forked import KDCORE

KINDS = (
    *("gate", "divergence", "splitter", "advantage", "matcher", "momentum"),
    *("drafter", "verifier", "engine", "score"),
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a new package of every kind, written by the command."""
    folder = tmp_path_factory.mktemp("packages")
    script = [
        "from kdcore_cli.main import run",
        *(
            f"assert not run(['plugins', 'new', 'new-{kind}', '--kind', '{kind}'])"
            for kind in KINDS
        ),
    ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def python(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs Python in one environment that has all of them."""
    run = environment(tmp_path_factory.mktemp("environment"))
    run(*INSTALL, *(packages / f"new-{kind}" for kind in KINDS))
    return run


def test_there_is_a_template_for_each_kind() -> None:
    assert tuple(EXAMPLES) == KINDS


def test_the_tests_of_each_pass_as_generated(python: Python, packages: Path) -> None:
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", packages, "--rootdir", packages)
    summary = said.splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary and "failed" not in summary
    for kind in KINDS:
        assert (packages / f"new-{kind}" / "tests" / f"test_new_{kind}.py").is_file()


def test_what_is_generated_is_as_clean_as_our_own(packages: Path) -> None:
    config = Path(__file__).parent.parent.parent / "pyproject.toml"
    selected = "B,C4,D,E,F,I,RUF,SIM,UP,W"
    ours = ["--extend-select", selected, "--config", "lint.pydocstyle.convention='google'"]
    assert f'"{selected.split(",")[0]}"' in config.read_text()
    for command in (["check", *ours, "--ignore", "D105,D107"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", packages],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_check_holds_a_plugin_to_the_kit(python: Python) -> None:
    outcome = json.loads(python("-c", KDCORE, "plugins", "check", "new-divergence", "--json"))
    assert len(outcome) > 8
    assert all(result["passed"] and not result["reason"] for result in outcome)


def test_check_says_what_fails_and_why(python: Python, packages: Path) -> None:
    """The same gate with a parameter that puts its weights out of the range."""
    broken = packages / "broken-gate"
    write_package("broken-gate", "gate", broken, installed())
    method = broken / "src" / "broken_gate" / "gate.py"
    method.write_text(method.read_text().replace(").float()", ").float() * 2"))
    python(*INSTALL, broken)
    said = python("-c", KDCORE, "plugins", "check", "broken-gate", code=1)
    assert "weights are between floor and one" in said
    assert "is not in [0.0, 1]" in " ".join(said.split())
    outcome = json.loads(python("-c", KDCORE, "plugins", "check", "broken-gate", "--json", code=1))
    assert {r["check"] for r in outcome if not r["passed"]} == {
        "test_weights_are_between_floor_and_one"
    }


def test_check_names_the_line_that_raised_and_a_reason_once(
    tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "far_gate.py").write_text(
        "class Far:\n"
        "    def __init__(self, params, context):\n"
        "        pass\n\n"
        "    def __call__(self, batch):\n"
        "        return batch.taecher\n"
    )
    component = Component(
        kind="gate", name="far", build="far_gate:Far", summary="is broken", source="mine"
    )
    suite = suite_of(component, registry=registry_with(component))
    found = [each for each in results(suite, "far_gate") if not each.passed]
    (reason,) = {each.reason for each in found}
    assert reason.startswith("AttributeError:") and reason.endswith("(far_gate, line 6)")
    out = Console(width=80)
    show_results(out, found)
    shown = capsys.readouterr().out
    assert shown.count("AttributeError") == 1
    assert shown.count("for the same reason") == len(found) - 1 > 3


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("a-gate", "source", "does not have a template"),
        ("A_gate", "gate", "invalid package name"),
        ("../gate", "gate", "invalid package name"),
        ("json", "gate", "already a Python keyword or module"),
        ("speckd", "gate", "already exists in kdcore"),
    ],
)
def test_a_bad_name_or_kind_writes_nothing(
    tmp_path: Path, name: str, kind: str, cause: str
) -> None:
    with pytest.raises(UserError, match=cause):
        write_package(name, kind, tmp_path / "package", installed())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        write_package("a-gate", "gate", tmp_path, installed())
    assert not list(tmp_path.iterdir())
