"""Commands that plugins add: each plugin's whole, or not at all."""

from __future__ import annotations

import traceback

import typer
from typer.core import TyperGroup
from typer.main import get_group

from kdcore.method.registry import Problem, Registry, describe


def add_commands(root: TyperGroup, registry: Registry) -> None:
    """Let each plugin add commands; one that fails or takes a used name is a recorded problem."""
    plugins = {plugin.label: plugin for plugin in registry.plugins}
    owner = dict.fromkeys(root.commands, "kdcore")
    for hook in registry.hooks.hook.kdcore_commands.get_hookimpls():
        plugin = plugins[hook.plugin_name]
        guest = typer.Typer()
        try:
            hook.function(guest)
            commands = get_group(guest).commands
            for name in commands.keys() & owner.keys():
                raise ValueError(f"its command '{name}' is already that of {owner[name]}")
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
