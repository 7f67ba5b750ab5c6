"""Command ``kdcore`` and its exit codes.

The exit code is 0 for success, 2 for a mistake in the user's input, 1 for an internal error or a
failed check, 130 for an interruption, and 141 if nobody reads the results any more.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from kdcore.components import registry
from kdcore.components.optional_packages import broken_package
from kdcore.components.registry import describe
from kdcore.errors import UserError
from kdcore.runs import interruption
from kdcore.runs.whole_files import FULL, PART
from kdcore_cli import guests
from kdcore_cli.commands import cache_commands, plugins_commands
from kdcore_cli.commands.doctor_command import doctor
from kdcore_cli.commands.exchange_commands import export, import_drafter, push
from kdcore_cli.commands.generate_command import generate
from kdcore_cli.commands.report_command import report
from kdcore_cli.commands.spec_commands import check, init, schema
from kdcore_cli.interruption import AGAIN, Interrupted, InterruptedRun
from kdcore_cli.standard_streams import READER_GONE, STDOUT, drop_results
from kdcore_cli.terminal.console import mistake, say, tell, tell_traceback, warn_of_problems
from kdcore_cli.terminal.quiet_libraries import silence_warnings

_DISK = {
    **dict.fromkeys(FULL, "free disk space"),
    errno.EIO: "check the disk",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.ENOTDIR), "fix the permissions"),
}
"""Errors of a file that cannot be written -> the first words of the cure."""
_MEMORY = (os.strerror(errno.ENOMEM), "Storage size calculation overflowed")
"""Messages of the system and of torch (for sizes beyond any memory) when memory runs out."""

_EXTRA_FIELD = re.compile(r"unexpected extra arguments?(?:\(s\))? \((\w[\w.]*=\S*)")
_HAD_OUTPUT = ("export", "import", "report", "schema")
"""Commands whose option ``--out`` was called ``--output``."""

HELP = """Distil language models and train speculative drafters from pluggable methods.

A spec file describes a run. To start:

kdcore init spec.yaml      write a starter spec

kdcore check spec.yaml     validate it and estimate its cost

kdcore distill spec.yaml   run it
"""


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: Words after ``kdcore``.

    Returns:
        The exit code.
    """
    debug = "--debug" in arguments  # accepted in any place
    if not {"--verbose", "-v"} & {*arguments}:  # before any command imports a library
        silence_warnings()
    try:
        _refuse_other_bytes(arguments)
        code = application().main(
            args=_with_out([word for word in arguments if word != "--debug"]),
            prog_name="kdcore",
            standalone_mode=False,
        )
        if code == 130:
            raise KeyboardInterrupt
        sys.stdout.flush()  # a full disk or a closed pipe may be known only now
        return code if isinstance(code, int) else 0
    except InterruptedRun:
        words = [word for word in arguments if word not in ("--overwrite", "--resume", "--debug")]
        say("yellow", "interrupted", "resume with: " + shlex.join(["kdcore", *words, "--resume"]))
        return 130
    except (Interrupted, KeyboardInterrupt) as stop:
        say("yellow", "interrupted", str(stop) or AGAIN)
        return 130
    except typer.Abort:  # the user did not answer a plugin's question
        return 130
    except Exception as fault:
        if interruption.was_interrupted():  # a library may have turned it into another error
            say("yellow", "interrupted", AGAIN)
            return 130
        return _failed(fault, debug)
    except SystemExit as stop:  # of typer, which ends the program at any closed pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        return _failed(stop.__context__, debug)


def _refuse_other_bytes(arguments: Sequence[str]) -> None:
    """Raises UserError for bytes that are not UTF-8, which neither safetensors nor JSON can name.

    Python keeps them as lone surrogates. They would otherwise fail after a model was loaded, or
    when a trained one is saved.
    """
    named = {f"argument {word!r}": word for word in arguments}
    with suppress(OSError):
        named[f"the name of the working directory, {os.getcwd()!r},"] = os.getcwd()
    for place, text in named.items():
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"{place} contains bytes that are not valid UTF-8",
                "write it in UTF-8, and rename a file or folder of such a name",
            )


def _with_out(words: list[str]) -> list[str]:
    """Replace the former name of ``--out``, in the commands that had it."""
    if words[:1] and words[0] in _HAD_OUTPUT:
        return [re.sub(r"^--output(?==|$)", "--out", word) for word in words]
    return words


def _failed(fault: Exception, debug: bool) -> int:
    """Print why a command failed, and return its exit code."""
    if isinstance(fault, OSError) and fault.filename == STDOUT:
        drop_results()  # what it still holds
        if isinstance(fault, BrokenPipeError):
            return READER_GONE
        cause = f"the results cannot be printed: {fault.strerror}"
        return _wrong(UserError(cause, "send stdout to another file"), debug)
    if isinstance(fault, UserError):
        return _wrong(fault, debug)
    if isinstance(fault, typer.TyperException):
        if not fault.format_message():  # no arguments: the help was already shown
            return 2
        context = getattr(fault, "ctx", None)
        command = context.command_path if context else "kdcore"
        warn_of_problems(registry.installed())  # one of them may provide the command
        cure = f"see `{command} --help`"
        cause = fault.format_message().replace(": Value error, ", ": ")  # of a choice
        field = _EXTRA_FIELD.search(cause)
        if context and field and any("--set" in each.opts for each in context.command.params):
            cure = f"write --set before each field: --set {field[1]}; {cure}"
        return _wrong(UserError(cause, cure), debug)
    if (refused := _refused_by_the_machine(fault)) or (refused := broken_package(fault)):
        return _wrong(refused, debug)
    if debug:
        tell_traceback()
    mistake(
        f"internal error in {registry.installed().whose(fault)}: {describe(fault)}",
        "rerun the command with --debug and report the traceback",
    )
    return 1


def _refused_by_the_machine(fault: BaseException | None) -> UserError | None:
    """Return the mistake when memory or disk is full, or a path cannot be used."""
    try:
        Path.cwd()
    except OSError:
        return UserError(
            "the working directory does not exist any more", "change to another folder (cd)"
        )
    while fault is not None:
        said = str(fault)
        # torch's OutOfMemoryError is known by its name, since not every command imports torch.
        full = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"
        if full or any(words in said for words in _MEMORY):
            asked = re.search(r"allocate ([\d.]+ \w+)", said)
            return UserError(
                f"out of memory{f': {asked[1]} could not be allocated' if asked else ''}",
                "lower batch_size, max_length or the sizes of a new model, or choose a smaller "
                "model; `kdcore check` estimates the memory that a run requires",
            )
        if getattr(fault, "errno", None) == errno.ELOOP:
            named = getattr(fault, "filename", None) or "a path"
            return UserError(
                f"{named} cannot be used: {os.strerror(errno.ELOOP)}",
                "remove the symbolic link that leads back to itself, or name another path",
            )
        if getattr(fault, "errno", None) == errno.ENAMETOOLONG:
            named = str(getattr(fault, "filename", None) or "")
            begins = max(named.split(os.sep), key=len)[:60]
            why = os.strerror(errno.ENAMETOOLONG)
            return UserError(f"path {begins!r}... cannot be used: {why}", "choose a shorter path")
        for number, cure in _DISK.items():
            reason = os.strerror(number)
            # safetensors gives the reason in its message only
            if getattr(fault, "errno", None) == number or reason in said:
                place = str(getattr(fault, "filename", None) or "a file").removesuffix(PART)
                elsewhere = "write to another folder (--out)"
                if _is_kept(place):
                    elsewhere = "set the environment variable KDCORE_CACHE to another folder"
                return UserError(
                    f"{place} cannot be written: {reason}",
                    f"{cure}, then rerun the command (a run with --resume), or {elsewhere}",
                )
        fault = fault.__cause__ or fault.__context__
    return None


def _is_kept(place: str) -> bool:
    """Whether a path is one of those that kdcore writes unasked."""
    from kdcore.models.folder.kept_files import cache_folder

    return Path(place).is_relative_to(cache_folder())


def application() -> TyperGroup:
    """Build the group of all commands, including those of jobs and plugins.

    Returns:
        The command group ``kdcore``.
    """
    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help starts a fifth faster and spends no columns on boxes
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in (init, check, schema, generate, doctor, report):
        app.command()(command)
    app.command()(export)
    app.command()(push)
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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
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


def _wrong(fault: UserError, debug: bool) -> int:
    if debug:
        tell_traceback()
    mistake(fault.cause, fault.cure)
    return 2
