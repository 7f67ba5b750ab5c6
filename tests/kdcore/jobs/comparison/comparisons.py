"""How the tests of a comparison write its spec and read what it shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcore.runs.comparison_results import COMPARISON
from kdcore.specs.compare import CompareSpec
from kdcore.specs.reading.file import read_spec
from kdcore_cli.terminal.comparison_table import show_comparison


def asked(folder: Path, base: dict[str, Any], **fields: Any) -> Path:
    spec = {"job": "compare", "run": str(folder / "run"), "base": base} | fields
    (folder / "compare.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return folder / "compare.yaml"


def compare_spec(file: Path) -> CompareSpec:
    spec = read_spec(file)
    assert isinstance(spec, CompareSpec)
    return spec


def shown(outcome: dict[str, Any], metric: str) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    show_comparison(console, COMPARISON.of_plain(outcome), metric)
    return " ".join(console.export_text().split())
