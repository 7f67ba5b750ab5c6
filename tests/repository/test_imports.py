"""Imports go down only: no two modules import each other, not even for the type checker."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOTS = (ROOT, ROOT / "plugins", ROOT / "cli")


def modules() -> dict[str, Path]:
    """The file of each module that is installed, by the module's name."""
    found = {}
    for root in ROOTS:
        for package in root.glob("kdcore*"):
            for file in package.rglob("*.py"):
                parts = file.relative_to(root).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(file: Path, known: set[str]) -> Iterator[str]:
    """The modules of ours that a file imports anywhere: in a function or for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = {f"{node.module}.{each.name}" for each in node.names}
            yield from names & known or {node.module}


def test_no_modules_import_each_other() -> None:
    files = modules()
    graph = {name: set(imported(file, set(files))) for name, file in files.items()}
    # an import for type checkers only: the graph has those too
    assert "kdcore.models.loading.loaded" in graph["kdcore_fasteagle.vllm_layout"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        raise AssertionError(" imports ".join(reversed(found.args[1]))) from None
