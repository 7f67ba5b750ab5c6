"""The audit of the lock file fails for a vulnerability, and says when it could not look."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["2.1"]}]}
OPEN = {"name": "d", "version": "4", "vulns": [{"id": "X-2", "fix_versions": []}]}
UNKNOWN = {"name": "c", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "lines"),
    [
        ([FINE], 0, ["no known vulnerability in 1 packages"]),
        (
            [FINE, UNKNOWN],
            0,
            ["no known vulnerability in 1 packages; the database does not know 1 others"],
        ),
        ([UNKNOWN, UNKNOWN], 0, ["NOT AUDITED: the database knows none of the 2 packages"]),
        (
            [FINE, BAD, OPEN, UNKNOWN],
            1,
            ["b 2: X-1, fixed in 2.1", "d 4: X-2, fixed in no version yet"],
        ),
    ],
)
def test_what_the_database_says(audit: Any, packages: Any, code: int, lines: list[str]) -> None:
    said = json.dumps({"dependencies": packages, "fixes": []})
    assert audit.judged(said, "") == (code, lines)


@pytest.mark.parametrize("said", ["", "Traceback", "[]", "{}"])
def test_a_database_that_is_not_reached(audit: Any, said: str) -> None:
    complaint = "ERROR: a\nERROR:pip_audit: connection refused\n"
    assert audit.judged(said, complaint) == (
        0,
        [
            "NOT AUDITED: the database is not reachable: ERROR:pip_audit: connection refused",
        ],
    )
