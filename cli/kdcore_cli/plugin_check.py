"""Conformance checks of an installed plugin, run from the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from kdcore.errors import UserError, nearest
from kdcore.method.hookspecs import Component
from kdcore.method.registry import Registry
from kdcore.specs.reading import plain_yaml
from kdcore.testing import suite_of
from kdcore.testing.suite import Result, examples, results
from kdcore_cli import console
from kdcore_cli.tables import table


def checked(name: str, assignments: Sequence[str], registry: Registry) -> Iterator[Result]:
    """Run every check of every component of a plugin.

    Args:
        name: Name of a plugin or of a distribution.
        assignments: Parameters as ``KIND.NAME.FIELD=VALUE``, each value in YAML.
        registry: Known components.

    Yields:
        The result of each check.

    Raises:
        UserError: The plugin does not exist, an assignment names none of its components, or
            Python runs without assertions.
    """
    if not __debug__:
        raise UserError(
            "Python runs without assertions, and the checks are assertions",
            "rerun the command without -O and without PYTHONOPTIMIZE",
        )
    components = _components(name, registry)
    given = _params(assignments, components)
    for component in components:
        console.say("dim", "checking", f"{component.kind} {component.name}")
        params = given.get((component.kind, component.name), {})
        missing = _missing(component, params)
        if missing:
            place = f"{component.kind}.{component.name}.{missing}"
            reason = f"{missing} has no default and no example: add --set {place}=VALUE"
            yield Result(component.kind, component.name, "test_its_params_are_known", False, reason)
        else:
            yield from results(suite_of(component, params=params, registry=registry))


def show_results(console: Console, outcome: Sequence[Result]) -> None:
    """Print a table with one row for each check, and the reason of each failure.

    Args:
        console: Console to print to.
        outcome: Results in the order of the rows.
    """
    rows = table("component", "check", "result")
    above = None
    for result in outcome:
        component = f"{result.kind} {result.name}"
        said = Text("passed", "green") if result.passed else Text(f"failed: {result.reason}", "red")
        check = result.check.removeprefix("test_").replace("_", " ")
        rows.add_row("" if component == above else Text(component, "bold"), check, said)
        above = component
    console.print(rows)
    failed = sum(not result.passed for result in outcome)
    console.print(f"{len(outcome) - failed} passed, {failed} failed")


def _components(name: str, registry: Registry) -> list[Component]:
    named = [
        component
        for component, plugin in registry.components()
        if name in (plugin.name, plugin.distribution)
    ]
    if named:
        return named
    for problem in registry.problems:
        if name in (problem.name, problem.distribution):
            raise UserError(str(problem), "fix or reinstall that distribution")
    known = {each for plugin in registry.plugins for each in (plugin.name, plugin.distribution)}
    if name in known:
        raise UserError(
            f"plugin '{name}' does not declare a component", "name a plugin with components"
        )
    raise UserError(f"unknown plugin '{name}'", nearest(name, known))


def _params(
    assignments: Sequence[str], components: Sequence[Component]
) -> Mapping[tuple[str, str], dict[str, Any]]:
    given: dict[tuple[str, str], dict[str, Any]] = {
        (component.kind, component.name): {} for component in components
    }
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
