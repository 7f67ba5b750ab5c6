"""Commands of jobs and plugins: all commands of a plugin are added, or none."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from kdcore.components.registry import Plugin, Problem, Registry, describe
from kdcore_cli.commands.run_commands import command_of, help_of


def commands_of(plugin: Plugin, registry: Registry) -> dict[str, Any]:
    """The commands of a plugin: one for each of its jobs, and those that its hook adds.

    Args:
        plugin: A plugin that registered.
        registry: Where it did; a fault of its hook is raised as it is.

    Returns:
        Name -> command.
    """
    guest = typer.Typer(rich_markup_mode=None)
    for job in plugin.jobs:
        guest.command(job.name, help=help_of(job))(command_of(job))
    for hook in registry.hooks.hook.kdcore_commands.get_hookimpls():
        if hook.plugin_name == plugin.label:
            hook.function(guest)
    return dict(get_group(guest).commands)


def add_commands(root: TyperGroup, registry: Registry) -> None:
    """Add the commands of each plugin: one for each of its jobs, and those that its hook adds.

    A plugin that raises an exception or reuses a name becomes a problem of the registry.

    Args:
        root: Command group that receives the commands.
        registry: Loaded plugins, kdcore's own first.
    """
    owner = dict.fromkeys(root.commands, "kdcore")
    for plugin in registry.plugins:
        try:
            commands = commands_of(plugin, registry)
            for name in commands.keys() & owner.keys():
                raise ValueError(f"its command '{name}' already exists in {owner[name]}")
        except (Exception, SystemExit) as fault:
            registry.problems.append(
                Problem(
                    plugin.name,
                    plugin.distribution,
                    plugin.version,
                    describe(fault),
                    traceback.format_exc(),
                )
            )
            continue
        owner |= dict.fromkeys(commands, f"{plugin.distribution} {plugin.version}")
        root.commands.update(commands)
