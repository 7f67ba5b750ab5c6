"""The conformance checks of an installed plugin, run from the command line."""

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
    """Every check of every component of the plugins called so, or of the distribution.

    assignments: ``KIND.NAME.FIELD=VALUE``, the value in YAML.

    Raises UserError when there is none, when an assignment is for no component of it, and when
    Python was told to leave assertions out.
    """
    if not __debug__:
        raise UserError(
            "Python leaves the checks out, which are assertions",
            "run it without -O and without PYTHONOPTIMIZE",
        )
    components = _components(name, registry)
    given = _params(assignments, components)
    for component in components:
        console.say("dim", "checking", f"{component.kind} {component.name}")
        params = given.get((component.kind, component.name), {})
        missing = _missing(component, params)
        if missing:
            place = f"{component.kind}.{component.name}.{missing}"
            reason = f"{missing} has no default and no example: give --set {place}=VALUE"
            yield Result(component.kind, component.name, "test_its_params_are_known", False, reason)
        else:
            yield from results(suite_of(component, params=params, registry=registry))


def show_results(console: Console, outcome: Sequence[Result]) -> None:
    """Each check in a row; a failed one says why."""
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
            raise UserError(str(problem), "repair or reinstall that distribution")
    known = {each for plugin in registry.plugins for each in (plugin.name, plugin.distribution)}
    if name in known:
        raise UserError(f"plugin '{name}' declares no component", "there is nothing to check")
    raise UserError(f"there is no plugin called '{name}'", nearest(name, known))


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
            raise UserError(f"{label}: this assigns nothing", "write --set KIND.NAME.FIELD=VALUE")
        if (kind, name) not in given:
            known = [".".join(each) for each in given]
            raise UserError(f"{label}: there is no {kind} '{name}' in it", nearest(dotted, known))
        given[kind, name][field] = plain_yaml.parse(text, functools.partial(_place, label))[0]
    return given


def _place(label: str, line: int) -> str:
    """Where a value stands, for messages: it has one line only."""
    return label


def _missing(component: Component, params: Mapping[str, Any]) -> str | None:
    """The first field that must be given and is not."""
    known = {**examples(component.params), **params}
    fields = component.params.model_fields.items()
    return next((n for n, field in fields if field.is_required() and n not in known), None)
