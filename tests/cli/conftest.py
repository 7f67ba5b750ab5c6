"""The command line in this process, over a registry of toys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdcore import registry
from kdcore.registry import Registry
from kdcore_cli import console, main
from tests.toy_components import registry as toys


@dataclass(frozen=True)
class Said:
    """What a command line answered."""

    code: int
    out: str
    err: str


Kdcore = Callable[..., Said]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """What the command line finds installed."""
    found = toys()
    monkeypatch.setattr(registry, "installed", lambda: found)
    return found


@pytest.fixture
def kdcore(
    installed: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Kdcore:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Said:
        console.out.cache_clear()  # the width may have changed since
        console.err.cache_clear()
        code = main.run(arguments)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run
