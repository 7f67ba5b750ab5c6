"""The command line in this process, over a registry of toys."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kdcore.library  # before a test replaces the registry that it asks for what is installed
from kdcore.components import registry
from kdcore.components.registry import Registry
from kdcore.runs.folder import Run
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.kdcore.specs.test_file import GOOD
from tests.tiny.toy_components import registry as toys


@dataclass(frozen=True)
class Said:
    """What a command line answered."""

    code: int
    out: str
    err: str


Kdcore = Callable[..., Said]

RESULTS: dict[str, Any] = {
    "before": {"teacher_kl": 2.5, "agreement": 0.25},
    "after": {"teacher_kl": 0.5, "agreement": 0.75, "unlisted": 1.0},
    "metrics": [
        {"name": "teacher_kl", "title": "teacher KL", "format": ".3f", "better": "lower"},
        {"name": "agreement", "title": "top-1 agreement", "format": ".1%", "better": "higher"},
        {"name": "speed", "title": "speed", "format": ".1f", "better": "higher"},
    ],
    "samples": [
        {
            "prompt": "What is\nthe capital [bold]of France[/bold]?",
            "teacher": "Paris is the capital.",
            "before": "the the the",
            "after": "It is Paris.",
        }
    ],
}


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the training; holds what it was asked, and what it shall do."""
    asked: dict[str, Any] = {
        "does": lambda run: run.write_text("results.json", json.dumps(RESULTS))
    }

    def distill(spec: Any, **options: Any) -> Run:
        asked.update(options, spec=spec)
        how = {name: options[name] for name in ("overwrite", "resume")}
        run = Run.open(spec.run, spec, options["registry"], **how)
        with run.closed_after(), options["progress"].stage("train", 2) as stage:
            stage.advance(loss=1.5)
            asked["does"](run)
            stage.advance(loss=1.25)
        return run

    def preflight(spec: Any, **options: Any) -> None:
        if "refuses" in asked:
            raise asked["refuses"]

    monkeypatch.setitem(sys.modules, "kdcore.jobs.distill", SimpleNamespace(distill=distill))  # type: ignore[arg-type]
    monkeypatch.setitem(
        sys.modules, "kdcore.jobs.preflight.distill", SimpleNamespace(preflight=preflight)
    )  # type: ignore[arg-type]
    Path("spec.yaml").write_text(GOOD)
    return asked


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
