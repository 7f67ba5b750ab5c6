"""A machine that lacks something says which tests it leaves out; in CI that is a failure."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.pages import ROOT
from tests.fixtures.processes.forked import python

NEEDY = """
import pytest

@pytest.mark.needs("public data")
@pytest.mark.parametrize("n", [1, 2])
def test_of_data(n): assert n

@pytest.mark.needs("chromium")
class TestOfPages:
    def test_a(self): pass

def test_of_neither(): pass
"""


def done_without(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests that need something on a machine that lacks everything."""
    (folder / "test_needy.py").write_text(NEEDY)
    own = {"PATH": str(folder), "KDCORE_DATA": "", "CI": "", "PYTHONPATH": str(ROOT)}
    words = ("-m", "pytest", "-q", "-ra", "-p", "tests.conftest", "--rootdir", folder)
    return python(*words, cwd=folder, env=own | environment)


def test_what_is_not_run_is_counted_and_named_in_one_line(tmp_path: Path) -> None:
    done = done_without(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said, counts = done.stdout.splitlines()[-2:]
    assert said == (
        "TESTS NOT RUN: 2 need public data (run `make data`, or export KDCORE_DATA=FOLDER), "
        "1 need chromium (put chromium on the path)"
    )
    assert counts.startswith("1 passed, 3 skipped")


def test_in_ci_it_is_a_failure(tmp_path: Path) -> None:
    done = done_without(tmp_path, CI="true")
    assert done.returncode == 1
    assert re.match(r"1 passed,( \d warnings?,)? 3 errors", done.stdout.splitlines()[-1])
    assert "needs public data: run `make data`" in done.stdout
    assert "NOT RUN" not in done.stdout


def test_what_is_there_is_tested(tmp_path: Path) -> None:
    (tmp_path / "chromium").touch(mode=0o755)
    done = done_without(tmp_path, CI="true", KDCORE_DATA="any")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("4 passed")


@pytest.mark.parametrize("folder", ["tests", "examples", "kdcore/testing", "cli"])
def test_nothing_else_keeps_a_test_from_being_run(folder: str) -> None:
    other = re.compile(r"\b(pytest|mark|unittest)\.(skip\w*|importorskip|xfail)\b|SkipTest")
    found = {
        (str(path.relative_to(ROOT)), match[0])
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".j2") and path != Path(__file__)
        for match in other.finditer(path.read_text())
    }
    assert found <= {("tests/conftest.py", "pytest.skip")}
