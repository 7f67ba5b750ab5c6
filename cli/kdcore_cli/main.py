"""The command line: what `kdcore` does, and what its exit code means.

0 done; 2 a mistake of the user's; 1 a fault of ours; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from kdcore.errors import UserError
from kdcore.method import registry
from kdcore.method.registry import describe
from kdcore_cli import cache_commands, guests, plugins_commands
from kdcore_cli.console import mistake, say, tell, warn_of_problems
from kdcore_cli.doctor_command import doctor
from kdcore_cli.exchange_commands import export_drafter, import_drafter
from kdcore_cli.generate_command import generate
from kdcore_cli.interruption import AGAIN, Interrupted
from kdcore_cli.report_command import report
from kdcore_cli.spec_commands import check, init, schema

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)
_MEMORY = (os.strerror(errno.ENOMEM), "Storage size calculation overflowed")
"""What the system, and torch of sizes beyond any memory, say."""

HELP = """Make language models smaller and faster, with methods that plug in and compose.

A run is described by a spec file. Three steps:

kdcore init spec.yaml      write a spec to begin from

kdcore check spec.yaml     say what it would do

kdcore distill spec.yaml   do it
"""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments  # taken wherever it stands
    try:
        code = application().main(
            args=[word for word in arguments if word != "--debug"],
            prog_name="kdcore",
            standalone_mode=False,
        )
        if code == 130:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (Interrupted, KeyboardInterrupt) as stop:
        say("yellow", "interrupted", str(stop) or AGAIN)
        return 130
    except typer.Abort:  # a plugin's question was not answered
        return 130
    except UserError as wrong:
        return _wrong(wrong.cause, wrong.cure, debug)
    except typer.TyperException as wrong:
        if not wrong.format_message():  # no arguments: the help is shown already
            return 2
        context = getattr(wrong, "ctx", None)
        command = context.command_path if context else "kdcore"
        warn_of_problems(registry.installed())  # one of them may have had the command
        return _wrong(wrong.format_message(), f"`{command} --help` shows how it is used", debug)
    except Exception as fault:
        if refused := _refused_by_the_machine(fault):
            return _wrong(*refused, debug)
        if debug:
            traceback.print_exc()
        mistake(
            f"internal error in {_whose(fault)}: {describe(fault)}",
            "run the command again with --debug, and report what it shows",
        )
        return 1


def _refused_by_the_machine(fault: BaseException | None) -> tuple[str, str] | None:
    """Cause and cure, when memory or a disk is full, or a place may not be written to."""
    while fault is not None:
        said = str(fault)
        # A GPU's is known by its name, since not every command imports torch.
        full = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"
        if full or any(words in said for words in _MEMORY):
            asked = re.search(r"allocate ([\d.]+ \w+)", said)
            return (
                f"there is too little memory{f' for {asked[1]} more' if asked else ''}",
                "lower batch_size, max_length or the sizes of what is made new, or choose a "
                "smaller model; `kdcore check` says what a training needs",
            )
        for number in _DISK:
            reason = os.strerror(number)
            if getattr(fault, "errno", None) == number or reason in said:  # safetensors only says
                place = getattr(fault, "filename", None)
                return (
                    f"{place or 'a file'} cannot be written: {reason}",
                    "make room or mend the rights there, and run the command again (a run goes on "
                    "with --resume), or write elsewhere (--out)",
                )
        fault = fault.__cause__ or fault.__context__
    return None


def _whose(fault: Exception) -> str:
    """The distribution of the plugin whose code was running, as its own package tells, or ours."""
    found = registry.installed()
    places = [(component.place, plugin) for component, plugin in found.components()]
    places += [(place, plugin) for job, plugin in found.jobs() for _, place in job.places()]
    owner = {place.split(".")[0].split(":")[0]: plugin for place, plugin in places}
    for frame, _ in reversed(list(traceback.walk_tb(fault.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package in owner:
            return f"{owner[package].distribution} {owner[package].version}"
    return "kdcore or a plugin"


def application() -> TyperGroup:
    """All commands, those of jobs and plugins included."""
    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help starts a fifth faster and wastes no columns on boxes
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in (init, check, schema, generate, doctor, report):
        app.command()(command)
    app.command("export")(export_drafter)
    app.command("import")(import_drafter)
    app.add_typer(cache_commands.app, name="cache")
    app.add_typer(plugins_commands.app, name="plugins")
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    found = registry.installed()
    guests.add_commands(root, found)
    jobs = [job.name for job, _ in found.jobs() if job.name in root.commands]
    shown = dict.fromkeys(["init", "check", "schema", *jobs, *root.commands])
    root.commands = {name: root.commands[name] for name in shown}
    return root


def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the versions and exit.", callback=_show_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


def _show_version(asked: bool) -> None:
    if asked:
        for name in ("kdcore", "torch", "transformers"):
            try:
                tell(f"{name} {version(name)}")
            except PackageNotFoundError:
                tell(f"{name} is not installed")
        raise typer.Exit


def _wrong(cause: str, cure: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    mistake(cause, cure)
    return 2
