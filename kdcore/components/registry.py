"""Which components and jobs exist, which plugins failed and why.

A plugin registers whole or not at all. One that fails is a recorded `Problem`, never an exception
for the others; a name that a spec asks for and that failed to load is an error that says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import textwrap
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

import pluggy
from pydantic import BaseModel

from kdcore.components import hookspecs
from kdcore.components.component import Component, Kind
from kdcore.components.hookspecs import GROUP, hookimpl
from kdcore.components.job import Job
from kdcore.components.optional_packages import broken_package
from kdcore.errors import UserError, nearest, with_article

_PLACE = r"[\w.]+:\w+"
THIS_PROGRAM = "this program"
"""Stands for a distribution where components come from a notebook or a script."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that registered: its entry point, its distribution, what it declares."""

    name: str
    distribution: str
    version: str
    components: tuple[Component, ...]
    jobs: tuple[Job, ...] = ()

    @property
    def label(self) -> str:
        """Its name in the plugin manager."""
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A plugin that did not register. ``details`` is the traceback, shown under --debug."""

    name: str
    distribution: str
    version: str
    reason: str
    details: str = ""

    def __str__(self) -> str:
        who = f"plugin '{self.name}' of {self.distribution} {self.version}"
        return f"{who} failed to load: {self.reason}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """An entry point made for another API version: listed, never imported."""

    name: str
    group: str
    distribution: str
    version: str


@dataclass
class Registry:
    """Components by kind and name, and jobs by name, with the plugins they came from."""

    plugins: list[Plugin] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    hooks: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager("kdcore"))
    _owner: dict[tuple[str, str], tuple[Component | Job, Plugin]] = field(default_factory=dict)
    _contested: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hooks.add_hookspecs(hookspecs)

    def names(self, kind: str) -> list[str]:
        """The names of all components of a kind, sorted."""
        return sorted(name for known, name in self._owner if known == kind)

    def components(self) -> list[tuple[Component, Plugin]]:
        """All components with their plugins, by kind and name."""
        order = get_args(Kind)
        found = [(c, plugin) for c, plugin in self._owner.values() if isinstance(c, Component)]
        return sorted(found, key=lambda c: (order.index(c[0].kind), c[0].name))

    def jobs(self) -> list[tuple[Job, Plugin]]:
        """All jobs with their plugins, as they are declared, kdcore's own first."""
        return [(job, plugin) for job, plugin in self._owner.values() if isinstance(job, Job)]

    def plugin_of(self, kind: str, name: str) -> Plugin:
        """The plugin that supplies a component or, where the kind is ``job``, a job."""
        self._declaration(kind, name)
        return self._owner[kind, name][1]

    def whose(self, fault: BaseException) -> str:
        """The distribution whose code raised an exception, by the package of its module."""
        places = [(component.place, plugin) for component, plugin in self.components()]
        places += [(place, plugin) for job, plugin in self.jobs() for _, place in job.places()]
        owner = {place.split(".")[0].split(":")[0]: plugin for place, plugin in places}
        for frame, _ in reversed(list(traceback.walk_tb(fault.__traceback__))):
            package = str(frame.f_globals.get("__name__", "")).split(".")[0]
            if package in owner:
                return f"{owner[package].distribution} {owner[package].version}"
        return "kdcore or a plugin"

    def component(self, kind: str, name: str) -> Component:
        """The declared component.

        Raises UserError when two distributions claim the name, or none does: then with near
        names and with the plugins that failed to load, one of which may have been meant.
        """
        found = self._declaration(kind, name)
        assert isinstance(found, Component), f"{kind} is not a component's kind"
        return found

    def job(self, name: str) -> Job:
        """The declared job.

        Args:
            name: what ``job:`` of a spec says.

        Raises:
            UserError: two distributions declare it, or none does (as for `component`).
        """
        found = self._declaration(Job.kind, name)
        assert isinstance(found, Job)
        return found

    def _declaration(self, kind: str, name: str) -> Component | Job:
        if (kind, name) in self._contested:
            raise UserError(
                self._contested[kind, name], "uninstall one of them, or ask its author to rename it"
            )
        if (kind, name) not in self._owner:
            cure = nearest(name, self.names(kind))
            if others := [other for other, known in self._owner if known == name]:
                cure = f"'{name}' is {' and '.join(map(with_article, others))}; {cure}"
            for problem in self.problems:
                cure += f"; {problem}"
            raise UserError(f"unknown {kind} '{name}'", cure)
        return self._owner[kind, name][0]

    def attribute(self, component: Component) -> Any:
        """What builds a component, imported if it is only named.

        Raises UserError naming the distribution when the import fails.
        """
        if not isinstance(component.build, str):
            return component.build
        module, _, name = component.build.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (Exception, SystemExit) as fault:
            if (broken := broken_package(fault)) is not None:
                raise broken from fault
            plugin = self.plugin_of(component.kind, component.name)
            raise UserError(
                f"{component.kind} '{component.name}' of {plugin.distribution} {plugin.version} "
                f"cannot be imported: {describe(fault)}",
                "reinstall that package, or choose another component",
            ) from fault

    def load(self, entries: Iterable[EntryPoint]) -> None:
        """Register each entry point's plugin, or record why it did not."""
        for entry in sorted(entries, key=_ours_first):
            name, distribution, version = entry.name, *_origin(entry)
            try:
                module = entry.load()
                self.register(module, name, distribution, version)
            except (Exception, SystemExit) as fault:
                details = traceback.format_exc()
                self.problems.append(Problem(name, distribution, version, describe(fault), details))

    def register(self, module: object, name: str, distribution: str, version: str) -> None:
        """Register one plugin whole.

        Raises whatever is wrong with it; the registry is then as it was before, except that a
        name claimed twice is from then on refused to everybody.
        """
        plugin = Plugin(name, distribution, version, ())
        try:
            self.hooks.register(module, plugin.label)
            self.hooks.check_pending()
            if not self.hooks.get_hookcallers(module):
                raise ValueError("it implements no hooks; mark its functions with @hookimpl")
            plugin = replace(
                plugin, components=tuple(_declared(module)), jobs=tuple(_declared_jobs(module))
            )
            declared: list[Component | Job] = [*plugin.components, *plugin.jobs]
            names = [(each.kind, each.name) for each in declared]
            for kind, name in names:
                if names.count((kind, name)) > 1:
                    raise ValueError(f"it declares {kind} '{name}' twice")
                self._claim(kind, name, plugin)
        except BaseException:
            self.hooks.unregister(name=plugin.label)
            raise
        self.plugins.append(plugin)
        self._owner.update({(each.kind, each.name): (each, plugin) for each in declared})

    def _claim(self, kind: str, name: str, plugin: Plugin) -> None:
        if (kind, name) in self._owner:
            other = self._owner[kind, name][1]
            clash = (
                f"{kind} '{name}' is declared by both {other.distribution} "
                f"{other.version} and {plugin.distribution} {plugin.version}"
            )
            self._contested[kind, name] = clash
            raise ValueError(clash)


def _declared(module: object) -> Iterable[Component]:
    """The components a module declares, each checked."""
    declare = getattr(module, "kdcore_components", None)
    if declare is None:
        return
    for component in declare():
        if not isinstance(component, Component):
            raise TypeError(f"kdcore_components returned {component!r}, which is not a Component")
        if component.kind not in get_args(Kind):
            raise ValueError(
                f"unknown kind '{component.kind}'; {nearest(component.kind, get_args(Kind))}"
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", component.name):
            raise ValueError(f"'{component.name}' is not a valid name (a-z, 0-9 and _)")
        if not _builds(component.build):
            raise ValueError(
                f"build of '{component.name}' must have the form 'module:attribute', or be callable"
            )
        if not (isinstance(component.params, type) and issubclass(component.params, BaseModel)):
            raise TypeError(f"params of '{component.name}' must be a pydantic model")
        if component.params.model_config.get("extra") != "forbid":
            raise ValueError(f"params of '{component.name}' must forbid extra keys")
        yield component


def _declared_jobs(module: object) -> Iterable[Job]:
    """The jobs a module declares, each checked."""
    declare = getattr(module, "kdcore_jobs", None)
    if declare is None:
        return
    for job in declare():
        if not isinstance(job, Job):
            raise TypeError(f"kdcore_jobs returned {job!r}, which is not a Job")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", job.name):
            raise ValueError(f"'{job.name}' is not a valid name of a job (a-z, 0-9 and -)")
        for field_name, place in job.places():
            if not re.fullmatch(_PLACE, place):
                raise ValueError(
                    f"{field_name} of job '{job.name}' must have the form 'module:attribute'"
                )
        if job.template is not None and not re.fullmatch(r"[\w.]+:[\w./-]+", job.template):
            raise ValueError(f"template of job '{job.name}' must have the form 'package:path'")
        if job.comparable and not job.run_folder:
            raise ValueError(f"job '{job.name}' is comparable, but has no run folder")
        yield job


def _builds(build: object) -> bool:
    named = isinstance(build, str) and re.fullmatch(_PLACE, build)
    return bool(named) or callable(build)


def describe(fault: BaseException) -> str:
    """An exception as one line."""
    text = textwrap.shorten(str(fault), 300, placeholder=" ...")
    return f"{type(fault).__name__}: {text}" if text else type(fault).__name__


def _origin(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "?")


def _ours_first(entry: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _origin(entry)
    return distribution != "kdcore", distribution, entry.name


@functools.cache
def installed() -> Registry:
    """The registry of this environment, read once.

    Raises UserError under ``KDCORE_STRICT=1`` when any plugin has a problem.
    """
    registry = Registry()
    every = entry_points()
    registry.load(every.select(group=GROUP))
    for group in sorted(every.groups):
        if re.fullmatch(r"kdcore\.v\d+", group) and group != GROUP:
            registry.foreign += [
                Foreign(entry.name, group, *_origin(entry)) for entry in every.select(group=group)
            ]
    if registry.problems and os.environ.get("KDCORE_STRICT") == "1":
        raise UserError(
            "; ".join(map(str, registry.problems)),
            "fix or uninstall these plugins, or unset KDCORE_STRICT",
        )
    return registry


def registry_with(*components: Component) -> Registry:
    """What is installed, and components of this program, without a package.

    Args:
        components: With ``build`` the class or function itself, or ``module:attribute``.

    Returns:
        A new registry, for the ``registry`` argument of what reads or carries out a spec. Nothing
        that is read without it knows these components.

    Raises:
        UserError: When a component is badly declared, or its name is taken.
    """
    here, found = Registry(), installed()
    here.plugins, here.problems, here.foreign = [*found.plugins], [*found.problems], found.foreign
    here._owner, here._contested = {**found._owner}, {**found._contested}
    for name, plugin in found.hooks.list_name_plugin():
        here.hooks.register(plugin, name)
    try:
        here.register(_Given(components), "registry_with", THIS_PROGRAM, "(not installed)")
    except (TypeError, ValueError) as wrong:
        raise UserError(str(wrong), "change the Component given to registry_with") from wrong
    return here


@dataclass(frozen=True)
class _Given:
    """A plugin that is no module."""

    components: tuple[Component, ...]

    @hookimpl
    def kdcore_components(self) -> Iterable[Component]:
        """Declare them."""
        return self.components
