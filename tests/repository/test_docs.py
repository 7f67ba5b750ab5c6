"""What README and docs say holds: specs are valid, code runs, tables are whole."""

from __future__ import annotations

import ast
import importlib
import re
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from kdcore.components.component import Component
from kdcore.components.registry import Registry, installed
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import SpecModel
from kdcore.specs.parts.on_policy import OnPolicySpec, SamplerSpec
from kdcore.specs.reading import plain_yaml
from kdcore.specs.reading.file import read_spec
from kdcore.testing import suite_of
from kdcore_cli.commands.parameters import fields_of, parameters
from tests.fixtures import fake_distributions as fake
from tests.fixtures.pages import BLOCKS, INCLUDED, PAGES, ROOT, Block

METHODS = "\n".join(path.read_text() for path in sorted((ROOT / "docs/methods").glob("*.md")))

BASE = {
    "job": "distill",
    "teacher": {"model": "some/teacher"},
    "student": {"layers": [0, 1]},
    "data": {"train": {"name": "chat", "path": "train.jsonl"}},
}
"""What a snippet that is part of a spec is a part of."""


def blocks(language: str) -> Any:
    """Parametrises a test by the blocks of a language that are not a file of the examples."""
    own = [b for b in BLOCKS if b.language == language and not INCLUDED.fullmatch(b.text)]
    assert own
    return pytest.mark.parametrize("block", own, ids=str)


def test_every_block_says_its_language_and_what_it_includes_exists() -> None:
    for block in BLOCKS:
        assert block.language in ("python", "sh", "text", "toml", "yaml"), str(block)
        if "--8" in block.text:
            included = INCLUDED.fullmatch(block.text)
            assert included and (ROOT / included[1]).is_file(), f"{block} includes no file"


@blocks("yaml")
def test_a_spec_in_the_docs_is_a_spec(block: Block, tmp_path: Path) -> None:
    """Either a whole one, or sections of one."""
    file = tmp_path / "spec.yaml"
    data, _ = plain_yaml.parse(block.text, lambda line: f"{block}+{line}")
    file.write_text(block.text if "job" in data else plain_yaml.dump({**BASE, **data}))
    read_spec(file)


@blocks("python")
def test_python_in_the_docs_compiles_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block}: {node.module} has no {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


def test_the_plugin_of_the_readme_passes_the_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = [b.text for b in BLOCKS if b.language == "python" and b.page == PAGES[0]]
    (source,) = [text for text in python if "@hookimpl" in text]
    (entry,) = [b.text for b in BLOCKS if b.language == "toml" and b.page == PAGES[0]]
    assert entry == '[project.entry-points."kdcore.v1"]\nmy_gate = "my_gate"\n'
    monkeypatch.syspath_prepend(tmp_path)
    fake.install(tmp_path, "my-gate", source)
    registry = Registry()
    registry.load(fake.entries(tmp_path))
    assert registry.problems == []
    suite = suite_of(registry.component("gate", "far_ahead"), registry=registry)
    checks = [name for name in dir(suite) if name.startswith("test_")]
    assert checks
    for name in checks:
        getattr(suite(), name)()


def test_the_loop_of_the_readme_is_that_of_the_page_whose_code_is_run() -> None:
    """`test_library_page.py` runs the page's."""
    python = [b.text for b in BLOCKS if b.language == "python" and b.page == PAGES[0]]
    (loop,) = [text for text in python if "for batch in loader" in text]
    page = (ROOT / "docs/library.md").read_text()
    lines = [line for line in loop.splitlines() if line]
    assert len(lines) == 9
    assert [line for line in lines if f"{line}\n" not in page] == []


def _table(text: str) -> list[list[str]]:
    """The cells of the rows of the first table in a text, without its heading."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def _tables(text: str) -> list[list[list[str]]]:
    return [_table(table) for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def _default(value: str | None) -> str:
    return "required" if value is None else f"`{value}`"


BUILT_IN = [
    component for component, plugin in installed().components() if plugin.distribution == "kdcore"
]


@pytest.mark.parametrize(
    "component",
    [c for c in BUILT_IN if c.kind not in ("source", "tree")],  # no methods; in one table
    ids=lambda component: f"{component.kind}-{component.name}",
)
def test_each_method_is_documented_with_its_defaults_and_whose_they_are(
    component: Component,
) -> None:
    heading = rf"^### {component.kind} `{component.name}`\n(.*?)(?=^##|\Z)"
    (section,) = re.findall(heading, METHODS, re.MULTILINE | re.DOTALL)
    rows = _table(section[section.find("| parameter") :]) if "| parameter" in section else []
    documented = [(row[0], row[1]) for row in rows]
    assert documented[: len(parameters(component))] == [
        (f"`{parameter.name}`", _default(parameter.default)) for parameter in parameters(component)
    ]
    for row in rows[: len(parameters(component))]:
        assert re.search(r"\[(paper|ours)\]|see ", row[2]), f"whose is {row[0]}?"


def test_the_other_tables_of_defaults_are_the_codes() -> None:
    """Those that do not stand in a method's own section: of trees, and of fields of a spec."""
    trees = [
        (f"`{component.name}`", f"`{parameter.name}`", _default(parameter.default))
        for component in BUILT_IN
        if component.kind == "tree"
        for parameter in parameters(component)
    ]
    fields = {
        f"`{field.name}`": _default(field.default)
        for model in (OnPolicySpec, SamplerSpec)
        for field in fields_of(model)
    } | {"`folder`": "in the run folder"}
    found = []
    for text in re.findall(r"(?:^\|.*\n)+", METHODS, re.MULTILINE):
        rows, tree = _table(text), ""
        if text.startswith("| tree | grows | parameter | default |"):
            for name, _, parameter, default, _ in rows:
                tree = name or tree
                found += [(tree, parameter, default)] if parameter else []
        elif text.startswith("| field | default |"):
            for names, defaults, *_ in rows:
                for name, default in zip(names.split(", "), cycle(defaults.split(", "))):
                    assert default == fields.pop(name), name
    assert sorted(found) == sorted(trees)
    of_endpoints = {f"`{field}`" for field in EndpointSpec.model_fields}
    assert fields.keys() <= of_endpoints, "a field of on-policy data has no default in the docs"


def test_the_readme_lists_what_is_built_in() -> None:
    rows = [row for table in _tables(PAGES[0].read_text()) for row in table]
    listed = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in rows}
    expected: dict[str, list[str]] = {}
    for component in BUILT_IN:
        expected.setdefault(component.kind, []).append(component.name)
    assert listed == expected


def _models() -> list[type[BaseModel]]:
    """Every model of a spec, from the jobs inwards."""
    found: list[type[BaseModel]] = []

    def walk(annotation: Any) -> None:
        inside = list(get_args(annotation))
        if isinstance(annotation, type) and issubclass(annotation, SpecModel):
            found.append(annotation)
            inside += [field.annotation for field in annotation.model_fields.values()]
        for other in inside:
            if other not in found:
                walk(other)

    for job, plugin in installed().jobs():
        if plugin.distribution == "kdcore":
            walk(job.spec)
    return found


@pytest.mark.parametrize("model", _models(), ids=lambda model: model.__name__)
def test_the_spec_reference_has_every_field_as_it_is(model: type[BaseModel]) -> None:
    """What is missing from docs/reference/specs.md is printed ready to be put there."""
    fields = parameters(
        Component(kind="gate", name="any", build="a:b", summary="", source="", params=model)
    )
    expected = [[f"`{f.name}`", f.type, _default(f.default), f.description] for f in fields]
    right = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    for table in _tables((ROOT / "docs/reference/specs.md").read_text()):
        if [row[:3] for row in table] == [row[:3] for row in expected]:
            for row, (*_, description) in zip(table, expected, strict=True):
                assert row[3], f"say what {row[0]} means"
                assert row[3] == description or not description, right
            return
    raise AssertionError(f"docs/reference/specs.md has no table for {model.__name__}:\n{right}")


def test_the_run_folder_is_documented_as_it_is() -> None:
    from kdcore.runs import folder as runs

    listed = re.findall(r"^    (\S+) {2,}", str(runs.__doc__), re.MULTILINE)
    assert listed
    page = (ROOT / "docs/reference/specs.md").read_text()
    assert [name for name in listed if f"| `{name}` |" not in page] == []


def test_links_of_the_readmes_lead_somewhere() -> None:
    for page in (*PAGES[:2], ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_what_the_docs_name_as_ours_is_there() -> None:
    """Modules, and what is in them, by their dotted names in backticks."""
    for page in PAGES:
        for name in re.findall(r"`(kdcore(?:\.[A-Za-z_]+)+)`", page.read_text()):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"
