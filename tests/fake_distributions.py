"""Distributions of broken and foreign plugins, in a folder as an installer would leave them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

GROUP = "kdcore.v1"


def install(site: Path, name: str, source: str, *, version: str = "1.0", group: str = GROUP) -> str:
    """Write a distribution of one module, named by one entry point; return the module's name."""
    module = name.replace("-", "_")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    return module


def entries(site: Path) -> Iterator[EntryPoint]:
    """The entry points that were installed in a folder."""
    for distribution in distributions(path=[str(site)]):
        yield from distribution.entry_points


def component(name: str, *, kind: str = "gate", build: str = "nowhere:Gate", more: str = "") -> str:
    """The source of a plugin module that declares one component."""
    return f"""
    from pydantic import BaseModel
    from kdcore.method.hookspecs import Component, hookimpl

    @hookimpl
    def kdcore_components():
        said = {{"summary": "summary", "source": "source"}}
        return [Component(kind="{kind}", name="{name}", build="{build}", **said{more})]
    """


IMPORT_ERROR = "import a_library_that_is_not_there"
EXITS = "import sys; sys.exit(3)"
RAISES = """
from kdcore.method.hookspecs import hookimpl

@hookimpl
def kdcore_components():
    raise RuntimeError("no licence\\nfound")
"""
NO_COMPONENT = """
from kdcore.method.hookspecs import hookimpl

@hookimpl
def kdcore_components():
    return ["speckd"]
"""
NO_HOOK = "def kdcore_components(): return []"
MISSPELT_HOOK = """
from kdcore.method.hookspecs import hookimpl

@hookimpl
def kdcore_component():
    return []
"""
WRONG_ARGUMENT = """
from kdcore.method.hookspecs import Component, hookimpl

@hookimpl
def kdcore_components():
    said = {"summary": "summary", "source": "source"}
    return [Component(kind="gate", name="half", build="nowhere:Gate", **said)]

@hookimpl
def kdcore_commands(application):
    pass
"""
