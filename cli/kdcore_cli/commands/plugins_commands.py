"""Commands ``plugins list``, ``plugins show``, ``plugins new`` and ``plugins check``."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kdcore.components import registry
from kdcore.components.component import Component, Kind
from kdcore.components.hookspecs import GROUP
from kdcore.components.job import Job
from kdcore.components.registry import Plugin, Registry
from kdcore.errors import UserError, nearest, with_article
from kdcore_cli.options import AsJson
from kdcore_cli.plugin_authoring.plugin_package import EXAMPLES, write_package
from kdcore_cli.terminal import console

if TYPE_CHECKING:
    from kdcore_cli.commands.parameters import Parameter

app = typer.Typer(help="List, show, create and check plugins.", no_args_is_help=True)

KINDS = (*get_args(Kind), Job.kind)
"""Kinds that `list` and `show` accept: those of components, and ``job``."""

OfKind = Annotated[
    str | None,
    typer.Option("--kind", metavar="KIND", help=f"Kind: {', '.join(KINDS)}."),
]


@app.command("list")
def list_components(kind: OfKind = None, as_json: AsJson = False) -> None:
    """List the installed components and jobs.

    For example:

    kdcore plugins list --kind gate
    """
    from rich.text import Text

    from kdcore_cli.terminal.tables import table

    found = registry.installed()
    chosen = [pair for pair in found.components() if _known(kind) in (None, pair[0].kind)]
    jobs = found.jobs() if kind in (None, Job.kind) else []
    if as_json:
        console.print_json(
            {
                "components": [_facts(component, plugin) for component, plugin in chosen],
                "jobs": [_job_facts(job, plugin) for job, plugin in jobs],
                "problems": [dataclasses.asdict(problem) for problem in found.problems],
                "other_api_versions": [dataclasses.asdict(entry) for entry in found.foreign],
            }
        )
        return
    shown = table("kind", "name", "summary", "from")
    rows: list[tuple[Component | Job, Plugin]] = [*chosen, *jobs]
    for declared, plugin in rows:
        origin = f"{plugin.distribution} {plugin.version}"
        shown.add_row(declared.kind, Text(declared.name, "bold"), declared.summary, origin)
    console.out().print(shown)
    console.warn_of_problems(found)
    for entry in found.foreign:
        who = f"plugin '{entry.name}' of {entry.distribution} {entry.version}"
        console.say("yellow", "not loaded", f"{who} requires API {entry.group}; this is {GROUP}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a component or a job.")],
    kind: OfKind = None,
    as_json: AsJson = False,
) -> None:
    """Show a component or a job, with its parameters.

    For example:

    kdcore plugins show speckd
    """
    from rich.padding import Padding

    from kdcore_cli.commands.parameters import parameters

    found = registry.installed()
    component = _declared(found, name, _known(kind))
    plugin = found.plugin_of(component.kind, name)
    if isinstance(component, Job):
        _show_job(component, plugin, as_json)
        return
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
    facts = {
        "source": component.source,
        "licence": _licence(component, plugin),
        "from": f"{plugin.distribution} {plugin.version}",
        "built by": component.place,
    }
    _show_declared(component, facts, "parameter", fields)
    if not fields:
        console.out().print(f"{name} has no parameters.")
    if docs:
        console.out().print(Padding(docs, (1, 0, 0, 0)))


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new package, e.g. my-gate.")
    ],
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help=f"Kind: {', '.join(EXAMPLES)}.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder to write (default: NAME)."),
    ] = None,
) -> None:
    """Write a starter package for a plugin.

    The package contains a working method, its parameters and its tests.

    For example:

    kdcore plugins new my-gate --kind gate
    """
    folder = out or Path(name)
    written = write_package(name, kind, folder, registry.installed())
    for file in written:
        console.tell(f"wrote {file}")
    where = shlex.quote(str(folder))
    console.tell(f"next: pip install -e {where} && kdcore plugins check {name}")


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(metavar="PLUGIN", help="Name of a plugin or of its distribution.")
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KIND.NAME.FIELD=VALUE",
            help="Set a parameter of a component, e.g. source.chat.path=prompts.jsonl, or a field "
            "of a job's starter, e.g. job.my-job.model=MODEL. May be given several times.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the conformance checks on an installed plugin.

    The checks run on each component, job and command of the plugin. Each component is built with
    its default parameters; a parameter without a default takes the first of its declared examples,
    or the value of --set. A job is not run: the checks read its starter and run its preflight on
    it. The exit code is 1 if a check fails.

    For example:

    kdcore plugins check kdcore --set source.chat.path=prompts.jsonl
    """
    from kdcore_cli.plugin_authoring.plugin_check import checked, show_results

    found = registry.installed()
    outcome = list(checked(name, sets or [], found))
    if as_json:
        console.print_json([dataclasses.asdict(result) for result in outcome])
    else:
        show_results(console.out(), outcome)
    if not all(result.passed for result in outcome):
        raise typer.Exit(1)


def _known(kind: str | None) -> str | None:
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind '{kind}'", nearest(kind, KINDS))
    return kind


def _declared(found: Registry, name: str, kind: str | None) -> Component | Job:
    """Find the component or job of a name.

    Raises UserError if it does not exist, or exists in several kinds.
    """
    if kind == Job.kind:
        return found.job(name)
    if kind is not None:
        return found.component(kind, name)
    every: list[Component | Job] = [component for component, _ in found.components()]
    every += [job for job, _ in found.jobs()]
    named = [each for each in every if each.name == name]
    if not named:
        known = {each.name for each in every}
        causes = "".join(f"; {problem}" for problem in found.problems)
        raise UserError(f"unknown component '{name}'", nearest(name, known) + causes)
    if len(named) > 1:
        kinds = " and ".join(each.kind for each in named)
        cure = "add " + " or ".join(f"--kind {each.kind}" for each in named)
        raise UserError(f"'{name}' exists as {kinds}", cure)
    return _declared(found, name, named[0].kind)


def _show_job(job: Job, plugin: Plugin, as_json: bool) -> None:
    from kdcore_cli.commands.parameters import fields_of

    try:
        fields = fields_of(job.spec)
    except UserError as broken:
        fields = []
        console.say("yellow", "warning", broken.cause)
    if as_json:
        listed = [dataclasses.asdict(field) for field in fields]
        console.print_json(_job_facts(job, plugin) | {"fields": listed})
        return
    facts = {"from": f"{plugin.distribution} {plugin.version}", "spec": job.model, "work": job.work}
    facts |= {"preflight": job.preflight} if job.preflight else {}
    _show_declared(job, facts, "field", fields)


def _show_declared(
    declared: Component | Job, facts: dict[str, str], what: str, fields: list[Parameter]
) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from kdcore_cli.terminal.tables import table

    line = f", {with_article(declared.kind)}: {declared.summary}"
    console.out().print(Text.assemble((declared.name, "bold"), line))
    rows = table("", "", show_header=False)
    for name, fact in facts.items():
        rows.add_row(name, fact)
    console.out().print(Padding(rows, (0, 0, 1, 0)))
    if not fields:
        return
    shown = table(what, "type", "default", "description")
    for field in fields:
        default = Text("required", "yellow") if field.default is None else field.default
        shown.add_row(Text(field.name, "bold"), field.type, default, field.description)
    console.out().print(shown)


def _job_facts(job: Job, plugin: Plugin) -> dict[str, Any]:
    origin = {"plugin": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
    return dataclasses.asdict(job) | origin


def _licence(component: Component, plugin: Plugin) -> str:
    ours = "method described in a public paper; implementation Apache-2.0"
    return component.licence or (ours if plugin.distribution == "kdcore" else "not declared")


def _facts(component: Component, plugin: Plugin) -> dict[str, Any]:
    return {
        "kind": component.kind,
        "name": component.name,
        "summary": component.summary,
        "source": component.source,
        "licence": _licence(component, plugin),
        "build": component.place,
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }
