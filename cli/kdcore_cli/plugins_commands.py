"""``plugins list`` and ``plugins show``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any, get_args

import typer

from kdcore import registry
from kdcore.errors import UserError, nearest
from kdcore.hookspecs import GROUP, Component, Kind
from kdcore.registry import Plugin, Registry
from kdcore_cli import console
from kdcore_cli.options import AsJson

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
    """Show one component: its parameters, its documentation, where it comes from.

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
    facts.add_row("built by", component.build)
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


def _known(kind: str | None) -> str | None:
    if kind is not None and kind not in get_args(Kind):
        raise UserError(f"there is no kind '{kind}'", nearest(kind, get_args(Kind)))
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
        raise UserError(f"there is no component called '{name}'", nearest(name, known) + causes)
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
        "build": component.build,
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }
