"""Conformance checks of an installed plugin: of its components, its jobs and its commands."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from kdcore.components.component import Component
from kdcore.components.job import Job
from kdcore.components.registry import Plugin, Registry, describe
from kdcore.errors import UserError, nearest
from kdcore.specs.reading import plain_yaml
from kdcore.testing import job_suite_of, suite_of
from kdcore.testing.suite import Result, examples, results
from kdcore_cli.guests import commands_of
from kdcore_cli.terminal import console
from kdcore_cli.terminal.tables import table


def checked(name: str, assignments: Sequence[str], registry: Registry) -> Iterator[Result]:
    """Run every check of the components, jobs and commands of a plugin.

    Args:
        name: Name of a plugin or of a distribution.
        assignments: Parameters as ``KIND.NAME.FIELD=VALUE``, each value in YAML; those of a
            job override fields of its starter.
        registry: Known components.

    Yields:
        The result of each check.

    Raises:
        UserError: The plugin does not exist, an assignment names nothing in it, or
            Python runs without assertions.
    """
    if not __debug__:
        raise UserError(
            "Python runs without assertions, and the checks are assertions",
            "rerun the command without -O and without PYTHONOPTIMIZE",
        )
    plugins = _plugins(name, registry)
    components = [each for each, plugin in registry.components() if plugin in plugins]
    jobs = [job for plugin in plugins for job in plugin.jobs]
    given = _params(assignments, [*components, *jobs])
    for component in components:
        console.say("dim", "checking", f"{component.kind} {component.name}")
        params = given.get((component.kind, component.name), {})
        missing = _missing(component, params)
        if missing:
            place = f"{component.kind}.{component.name}.{missing}"
            reason = f"{missing} has no default and no example: add --set {place}=VALUE"
            yield Result(component.kind, component.name, "test_its_params_are_known", False, reason)
        else:
            suite = suite_of(component, params=params, registry=registry)
            yield from results(suite, _package_of(component.build))
    for job in jobs:
        console.say("dim", "checking", f"job {job.name}")
        over = given.get((job.kind, job.name), {})
        sets = [f"{field}={json.dumps(value)}" for field, value in over.items()]
        yield from results(job_suite_of(job, sets=sets, registry=registry), _package_of(job.work))
    for plugin in plugins:
        yield from _of_commands(plugin, registry)


def _package_of(place: Any) -> str:
    """The package of ``module:attribute``, or of a class or a function."""
    module = place.partition(":")[0] if isinstance(place, str) else place.__module__
    return str(module).partition(".")[0]


def _of_commands(plugin: Plugin, registry: Registry) -> Iterator[Result]:
    """Whether its commands, those of its jobs included, are added and have a help."""
    added = "test_its_commands_are_added"
    for problem in registry.problems:
        if (problem.name, problem.distribution) == (plugin.name, plugin.distribution):
            yield Result("command", plugin.name, added, False, problem.reason)
            return
    commands = commands_of(plugin, registry)
    if commands:
        yield Result("command", plugin.name, added, True)
    for name, command in commands.items():
        try:
            command.get_help(typer.Context(command, info_name=name))
            reason = "" if command.help else "it has no help: give its function a docstring"
        except (Exception, SystemExit) as fault:
            reason = describe(fault)
        yield Result("command", name, "test_its_help_can_be_made", not reason, reason)


def show_results(console: Console, outcome: Sequence[Result]) -> None:
    """Print a table with one row for each check, and the reason of each failure.

    Args:
        console: Console to print to.
        outcome: Results in the order of the rows.
    """
    rows = table("what", "check", "result")
    above, told = None, set[tuple[str, str]]()
    for result in outcome:
        component = f"{result.kind} {result.name}"
        reason = "for the same reason" if (component, result.reason) in told else result.reason
        said = Text("passed", "green") if result.passed else Text(f"failed: {reason}", "red")
        check = result.check.removeprefix("test_").replace("_", " ")
        rows.add_row("" if component == above else Text(component, "bold"), check, said)
        above = component
        told.add((component, result.reason))
    console.print(rows)
    failed = sum(not result.passed for result in outcome)
    console.print(f"{len(outcome) - failed} passed, {failed} failed")


def _plugins(name: str, registry: Registry) -> list[Plugin]:
    """Those of that name that declare a component, a job or commands.

    Raises UserError when there is none.
    """
    named = [each for each in registry.plugins if name in (each.name, each.distribution)]
    hooks = registry.hooks.hook.kdcore_commands.get_hookimpls()
    commanding = {hook.plugin_name for hook in hooks}
    able = [p for p in named if p.components or p.jobs or p.label in commanding]
    if able:
        return able
    for problem in registry.problems:
        if name in (problem.name, problem.distribution):
            raise UserError(str(problem), "fix or reinstall that distribution")
    known = {each for plugin in registry.plugins for each in (plugin.name, plugin.distribution)}
    if name in known:
        raise UserError(
            f"plugin '{name}' does not declare a component, job or command",
            "name another plugin",
        )
    raise UserError(f"unknown plugin '{name}'", nearest(name, known))


def _params(
    assignments: Sequence[str], declared: Sequence[Component | Job]
) -> Mapping[tuple[str, str], dict[str, Any]]:
    given: dict[tuple[str, str], dict[str, Any]] = {(each.kind, each.name): {} for each in declared}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        label = f"--set {assignment}"
        kind, _, rest = dotted.partition(".")
        name, _, field = rest.partition(".")
        if not equals or not field:
            raise UserError(f"{label} does not assign a value", "write --set KIND.NAME.FIELD=VALUE")
        if (kind, name) not in given:
            known = [".".join(each) for each in given]
            raise UserError(
                f"{label}: the plugin does not declare {kind} '{name}'", nearest(dotted, known)
            )
        given[kind, name][field] = plain_yaml.parse(text, functools.partial(_place, label))[0]
    return given


def _place(label: str, line: int) -> str:
    """Return the place of a value for messages; it has one line only."""
    return label


def _missing(component: Component, params: Mapping[str, Any]) -> str | None:
    """Return the first required field without a value."""
    known = {**examples(component.params), **params}
    fields = component.params.model_fields.items()
    return next((n for n, field in fields if field.is_required() and n not in known), None)
