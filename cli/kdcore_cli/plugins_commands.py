"""``plugins list``, ``show``, ``new`` and ``check``."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kdcore.errors import UserError, nearest
from kdcore.method import registry
from kdcore.method.hookspecs import GROUP, Component, Kind
from kdcore.method.registry import Plugin, Registry
from kdcore_cli import console
from kdcore_cli.options import AsJson
from kdcore_cli.plugin_package import EXAMPLES, write_package

app = typer.Typer(help="What is installed: methods, data sources, drafters.", no_args_is_help=True)

OfKind = Annotated[
    str | None,
    typer.Option("--kind", metavar="KIND", help=f"One of {', '.join(get_args(Kind))}."),
]


@app.command("list")
def list_components(kind: OfKind = None, as_json: AsJson = False) -> None:
    """List the components that a spec may name.

    For example:

    kdcore plugins list --kind gate
    """
    from rich.text import Text

    from kdcore_cli.tables import table

    found = registry.installed()
    chosen = [pair for pair in found.components() if _known(kind) in (None, pair[0].kind)]
    if as_json:
        console.print_json(
            {
                "components": [_facts(component, plugin) for component, plugin in chosen],
                "problems": [dataclasses.asdict(problem) for problem in found.problems],
                "other_api_versions": [dataclasses.asdict(entry) for entry in found.foreign],
            }
        )
        return
    shown = table("kind", "name", "summary", "from")
    for component, plugin in chosen:
        origin = f"{plugin.distribution} {plugin.version}"
        shown.add_row(component.kind, Text(component.name, "bold"), component.summary, origin)
    console.out().print(shown)
    console.warn_of_problems(found)
    for entry in found.foreign:
        who = f"plugin '{entry.name}' of {entry.distribution} {entry.version}"
        console.say("yellow", "not loaded", f"{who} is for {entry.group}, this is {GROUP}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A component's name.")],
    kind: OfKind = None,
    as_json: AsJson = False,
) -> None:
    """Show one component: its parameters and its documentation.

    For example:

    kdcore plugins show speckd
    """
    from rich.padding import Padding
    from rich.text import Text

    from kdcore_cli.parameters import parameters
    from kdcore_cli.tables import table

    found = registry.installed()
    component = _component(found, name, _known(kind))
    plugin = found.plugin_of(component.kind, name)
    fields = parameters(component)
    try:
        docs = inspect.getdoc(found.attribute(component)) or ""
    except UserError as broken:
        docs = ""
        console.say("yellow", "warning", broken.cause)
    if as_json:
        listed = [dataclasses.asdict(field) for field in fields]
        console.print_json(_facts(component, plugin) | {"parameters": listed, "docs": docs})
        return
    console.out().print(Text.assemble((name, "bold"), f", a {component.kind}: {component.summary}"))
    facts = table("", "", show_header=False)
    facts.add_row("source", component.source)
    facts.add_row("licence", component.licence)
    facts.add_row("from", f"{plugin.distribution} {plugin.version}")
    facts.add_row("built by", component.place)
    console.out().print(Padding(facts, (0, 0, 1, 0)))
    if fields:
        shown = table("parameter", "type", "default", "description")
        for field in fields:
            default = Text("needed", "yellow") if field.default is None else Text(field.default)
            shown.add_row(Text(field.name, "bold"), field.type, default, field.description)
        console.out().print(shown)
    else:
        console.out().print("It has no parameters.")
    if docs:
        console.out().print(Padding(Text(docs), (1, 0, 0, 0)))


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The package's name, e.g. my-gate.")],
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help=f"One of {', '.join(EXAMPLES)}.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where to write it; by default its name."),
    ] = None,
) -> None:
    """Write a plugin package to begin from.

    It holds a method that works, its parameters and its tests.

    For example:

    kdcore plugins new my-gate --kind gate
    """
    folder = out or Path(name)
    written = write_package(name, kind, folder, registry.installed())
    console.tell("wrote " + "\n      ".join(map(str, written)))
    where = shlex.quote(str(folder))
    console.tell(f"next: pip install -e {where} && kdcore plugins check {name}")


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(metavar="PLUGIN", help="A plugin's name, or its distribution's.")
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KIND.NAME.FIELD=VALUE",
            help="A parameter to check a component with, e.g. source.chat.path=prompts.jsonl. "
            "May be given several times.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the conformance checks on an installed plugin.

    They run on each of its components. A component is built with its defaults; a parameter without
    one has the first of its declared examples, or is given with --set. Exit code 1 if a check
    fails.

    For example:

    kdcore plugins check kdcore --set source.chat.path=prompts.jsonl
    """
    from kdcore_cli.plugin_check import checked, show_results

    found = registry.installed()
    outcome = list(checked(name, sets or [], found))
    if as_json:
        console.print_json([dataclasses.asdict(result) for result in outcome])
    else:
        show_results(console.out(), outcome)
    if not all(result.passed for result in outcome):
        raise typer.Exit(1)


def _known(kind: str | None) -> str | None:
    if kind is not None and kind not in get_args(Kind):
        raise UserError(f"unknown kind '{kind}'", nearest(kind, get_args(Kind)))
    return kind


def _component(found: Registry, name: str, kind: str | None) -> Component:
    """The one component of that name.

    Raises UserError when there is none, or one in each of several kinds.
    """
    if kind is not None:
        return found.component(kind, name)
    named = [component for component, _ in found.components() if component.name == name]
    if not named:
        known = {component.name for component, _ in found.components()}
        causes = "".join(f"; {problem}" for problem in found.problems)
        raise UserError(f"unknown component '{name}'", nearest(name, known) + causes)
    if len(named) > 1:
        kinds = " and ".join(component.kind for component in named)
        raise UserError(f"'{name}' is the name of a {kinds}", f"add --kind {named[0].kind}")
    return found.component(named[0].kind, name)


def _facts(component: Component, plugin: Plugin) -> dict[str, Any]:
    return {
        "kind": component.kind,
        "name": component.name,
        "summary": component.summary,
        "source": component.source,
        "licence": component.licence,
        "build": component.place,
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }
