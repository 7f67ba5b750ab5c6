"""Exit codes, messages, and what starting up costs."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import modeling_gguf_pytorch_utils
from typer.core import TyperGroup

from kdcore.components.hookspecs import hookimpl
from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore_cli import main
from kdcore_cli.terminal.quiet_libraries import quieten
from tests.cli.conftest import RESULTS, Kdcore
from tests.fixtures import fake_distributions as fake
from tests.fixtures.processes.forked import python
from tests.kdcore.reporting import run_folders


def plugin(**hooks: object) -> object:
    """A plugin object with these hooks."""
    return type("Plugin", (), {name: staticmethod(hookimpl(f)) for name, f in hooks.items()})()


def every_command(group: TyperGroup, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of each command, those of groups included."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from every_command(command, *path, name)
        else:
            yield (*path, name)


COMMANDS = sorted(every_command(main.application()))
TABLES = ("check", "distill", "train-drafter", "compare", "evaluate", "bench", "doctor")
"""The commands that load models and show a table."""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_and_fits_80_columns(
    kdcore: Kdcore, command: tuple[str, ...]
) -> None:
    said = kdcore(*command, "--help")
    assert (said.code, said.err) == (0, "")
    assert max(map(len, said.out.splitlines())) <= 80
    assert f"For example:\n\n  kdcore {' '.join(command)}" in said.out


def test_a_field_without_set_is_told_of_it(kdcore: Kdcore) -> None:
    said = kdcore("distill", "spec.yaml", "training.steps=4", "run=here")
    assert said.code == 2
    assert "fix: write --set before each field: --set training.steps=4; see `kdcore" in said.err
    other = kdcore("report", "run", "training.steps=4")
    assert (other.code, "--set" in other.err) == (2, False)


@pytest.mark.parametrize("group", [(), ("cache",), ("plugins",)], ids=" ".join)
def test_a_list_of_commands_cuts_no_summary(kdcore: Kdcore, group: tuple[str, ...]) -> None:
    said = kdcore(*group, "--help")
    assert "..." not in said.out.partition("Commands:")[2]
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize("command", TABLES)
def test_what_loads_models_and_shows_a_table_can_be_quiet_verbose_and_json(
    kdcore: Kdcore, command: str
) -> None:
    shown = kdcore(command, "--help").out
    assert all(option in shown for option in ("--quiet", "--verbose", "--json"))


def test_json_is_what_a_training_prints(kdcore: Kdcore, training: dict[str, Any]) -> None:
    said = kdcore("distill", "spec.yaml", "--json")
    assert json.loads(said.out) == RESULTS


def test_version_names_what_results_depend_on(kdcore: Kdcore) -> None:
    said = kdcore("--version")
    assert [line.split()[0] for line in said.out.splitlines()] == [
        "kdcore",
        "torch",
        "transformers",
    ]


@pytest.mark.parametrize(
    ("arguments", "cause", "cure"),
    [
        (["distil"], "No such command 'distil'", "`kdcore --help`"),
        (["distill"], "Missing argument", "`kdcore distill --help`"),
        (["distill", "a.yaml", "--stes", "3"], "No such option: --stes", "`kdcore distill --help`"),
        (["compare", "a", "--on", "rai"], "'--on': 'rai' is not one of 'ray'", "compare --help`"),
        (["plugins", "shw", "all"], "No such command 'shw'", "`kdcore plugins --help`"),
        (["check", "none.yaml"], "file not found: none.yaml", "`kdcore init`"),
        (
            ["evaluate", "none"],
            "none does not contain a run, and --data is missing",
            "name the folder of a run",
        ),
        (["plugins", "show", "speckt"], "unknown component 'speckt'", "'speckd'"),
        (["plugins", "list", "--kind", "gat"], "unknown kind 'gat'", "'gate'"),
        (["schema", "distil"], "unknown job 'distil'", "'distill'"),
        (["init", "--job", "distil"], "unknown job 'distil'", "'distill'"),
        (["distill", "a", "--resume", "--overwrite"], "exclude each other", "remove one"),
    ],
)
def test_a_mistake_is_one_line_of_cause_and_one_of_cure(
    kdcore: Kdcore, arguments: list[str], cause: str, cure: str
) -> None:
    said = kdcore(*arguments)
    assert (said.code, said.out) == (2, "")
    first, second = said.err.splitlines()
    assert first.startswith("error: ")
    assert cause in first
    assert second.startswith("  fix: ")
    assert cure in second


def test_debug_shows_the_traceback_wherever_it_stands(kdcore: Kdcore) -> None:
    for arguments in (["--debug", "check", "none.yaml"], ["check", "none.yaml", "--debug"]):
        said = kdcore(*arguments)
        assert said.code == 2
        assert "Traceback" in said.err
        assert "error: file not found: none.yaml" in said.err


def test_a_fault_of_ours_is_code_1_and_says_how_to_see_it(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(main.typer.Typer, "add_typer", broken)
    said = kdcore("plugins", "list")
    assert said.code == 1
    # `broken` lies in the package that also holds the toy plugin
    assert said.err.startswith("error: internal error in toys 1.0: ZeroDivisionError: oh\n")
    assert "--debug" in said.err
    assert "Traceback" not in said.err
    assert "Traceback" in kdcore("plugins", "list", "--debug").err


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/first/run.json"),
            "free disk space",
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/first"), "fix the permissions"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "runs/first"), "check the disk"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "runs/first/run.json"), "free disk space"),
        (
            RuntimeError("Error while serializing: No space left on device (os error 28)"),
            "free disk space",
        ),
    ],
)
def test_a_full_disk_is_no_fault_of_ours(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch, fault: Exception, cure: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("while that was handled") from fault

    monkeypatch.setattr(main.typer.Typer, "add_typer", broken)
    said = kdcore("plugins", "list")
    assert said.code == 2
    assert f"{getattr(fault, 'filename', 'a file')} cannot be written: " in said.err
    assert f"fix: {cure}, then rerun the command" in said.err
    assert "--resume" in said.err and "Traceback" not in said.err


def test_a_cache_that_cannot_be_written_is_moved_by_its_variable(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another folder for the results would not help."""
    kept = tmp_path / "cache/openvino/model"

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(kept))

    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(main.typer.Typer, "add_typer", broken)
    said = kdcore("plugins", "list")
    assert said.code == 2 and "--out" not in said.err
    assert "or set the environment variable KDCORE_CACHE to another folder" in said.err


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free disk space, or name another file (--out)"),
        (errno.EACCES, "name another file (--out)"),
    ],
)
def test_a_report_that_cannot_be_written(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    run = run_folders.distilled(Path("runs/good"))
    monkeypatch.setattr("kdcore.library.write_text", full)
    said = kdcore("report", str(run))
    assert said.code == 2 and f"report.html cannot be written: {os.strerror(number)}" in said.err
    assert said.err.endswith(f"fix: {cure}\n")


def test_an_output_that_is_not_writable_is_told_before_the_model_is_read(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for command in (
        ("export", "nowhere", "--format", "torchao-int8", "--out", "deep/small"),
        ("import", "nowhere", "--target", "nowhere", "--out", "deep/small"),
    ):
        said = kdcore(*command)
        assert said.code == 2 and "deep/small cannot be written: " in said.err
        assert said.err.endswith("fix: use a writable folder\n")


@pytest.mark.parametrize("command", [("report",), ("cache", "inspect")])
def test_a_path_that_is_too_long_is_told_in_one_line(kdcore: Kdcore, command: list[str]) -> None:
    said = kdcore(*command, "a" * 300)
    reason = os.strerror(errno.ENAMETOOLONG)
    assert said.code == 2
    assert said.err == (
        f"error: path '{'a' * 60}'... cannot be used: {reason}\n  fix: choose a shorter path\n"
    )


def test_links_that_lead_in_a_circle_are_told_of_in_one_line(
    kdcore: Kdcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    said = kdcore("cache", "inspect", "loop")
    assert said.code == 2 and "Traceback" not in said.err
    reason = os.strerror(errno.ELOOP)
    assert f"loop/manifest.json cannot be used: {reason}\n  fix: remove the symb" in said.err
    assert kdcore("schema", "--out", "loop", "--overwrite").code == 0
    assert not Path("loop").is_symlink()


def test_a_working_directory_that_is_gone_is_no_fault_of_ours(
    kdcore: Kdcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = kdcore("init")
    assert said.code == 2
    assert said.err.startswith("error: the working directory does not exist any more\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_names_in_other_bytes_are_refused_before_anything_is_done(
    kdcore: Kdcore, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Latin-1 writes an é: Python reads such a byte as a lone surrogate."""
    said = kdcore(*command, "caf\udce9", "--out", "x")
    error, cure = said.err.splitlines()
    assert said.code == 2
    assert error == r"error: argument 'caf\udce9' contains bytes that are not valid UTF-8"
    assert cure == "  fix: write it in UTF-8, and rename a file or folder of such a name"
    monkeypatch.setattr(os, "getcwd", lambda: "/caf\udce9")
    said = kdcore(*command)
    assert r"error: the name of the working directory, '/caf\udce9'," in said.err
    assert said.code == 2 and not os.listdir(".")


def test_a_stream_that_cannot_show_a_text_shows_its_code() -> None:
    done = python("-c", NARROW)
    assert (done.returncode, done.stdout) == (0, "\\u65e5\n")


NARROW = """
import sys, kdcore_cli.main
sys.stdout.reconfigure(encoding="ascii", errors="strict")
kdcore_cli.main.run = lambda words: print(chr(0x65e5))
from kdcore_cli.console_script import main; main()
"""


def _beyond_the_machine() -> RuntimeError:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**46)  # 256 TiB: what no system has addresses for
    return refused.value


def _beyond_any_machine() -> RuntimeError:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**40, 2**40)
    return refused.value


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (_beyond_the_machine(), f"out of memory: {2**48} bytes could not be allocated"),
        (_beyond_any_machine(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), "2.50 GiB"),
        (MemoryError(), "out of memory"),
    ],
)
def test_too_little_memory_is_no_fault_of_ours(
    kdcore: Kdcore, monkeypatch: pytest.MonkeyPatch, fault: Exception, asked: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(main.typer.Typer, "add_typer", broken)
    said = kdcore("plugins", "list")
    assert said.code == 2
    error, fix = said.err.splitlines()
    assert asked in error and "lower batch_size" in fix


def test_a_plugin_adds_a_command(kdcore: Kdcore, installed: Registry) -> None:
    def kdcore_commands(app: typer.Typer) -> None:
        @app.command()
        def greet(name: str) -> None:
            """Say hello."""
            if name == "nobody":
                raise UserError("nobody is there", "greet somebody")
            print(f"hello {name}")

    installed.register(plugin(kdcore_commands=kdcore_commands), "greet", "greetings", "1.0")
    assert "Say hello." in kdcore("--help").out
    assert kdcore("greet", "you").out == "hello you\n"
    assert kdcore("greet", "nobody").code == 2


def test_an_interrupted_command_is_code_130(kdcore: Kdcore, installed: Registry) -> None:
    def kdcore_commands(app: typer.Typer) -> None:
        @app.command()
        def wait() -> None:
            raise KeyboardInterrupt

    installed.register(plugin(kdcore_commands=kdcore_commands), "wait", "waiting", "1.0")
    said = kdcore("wait")
    assert (said.code, said.err) == (130, "interrupted: run the command again\n")


def test_ctrl_c_before_the_command_begins_is_code_130_too(
    kdcore: Kdcore, installed: Registry
) -> None:
    def kdcore_commands(app: typer.Typer) -> None:
        raise KeyboardInterrupt

    installed.register(plugin(kdcore_commands=kdcore_commands), "slow", "slow", "1.0")
    said = kdcore("plugins", "list")
    assert (said.code, said.err) == (130, "interrupted: run the command again\n")


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("typer", ["--help"]),
        ("pydantic", ["check", "none.yaml"]),
        ("rich", ["check", "none.yaml"]),  # what the mistake is told with
        ("torch", ["generate", "MODEL", "hello"]),
    ],
)
def test_ctrl_c_while_a_library_is_imported_is_code_130_too(
    site: Path, library: str, arguments: list[str]
) -> None:
    ctrl_c = "import signal\nsignal.raise_signal(signal.SIGINT)\n"
    (site / f"{library}.py").write_text(ctrl_c)
    done = subprocess.run(
        [Path(sys.executable).with_name("kdcore"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert (done.returncode, done.stderr) == (130, "interrupted: run the command again\n")


def test_a_plugin_with_a_bad_command_does_not_harm_the_others(
    kdcore: Kdcore, installed: Registry
) -> None:
    def raises(app: typer.Typer) -> None:
        raise RuntimeError("oh")

    def takes_a_used_name(app: typer.Typer) -> None:
        app.command("distill")(lambda: print("mine"))

    installed.register(plugin(kdcore_commands=raises), "a", "raising", "1.0")
    installed.register(plugin(kdcore_commands=takes_a_used_name), "b", "taking", "2.0")
    said = kdcore("plugins", "list")
    assert said.code == 0
    assert "plugin 'a' of raising 1.0 failed to load: RuntimeError: oh" in said.err
    assert (
        "taking 2.0 failed to load: ValueError: its command 'distill' already exists in" in said.err
    )
    assert "Distil a student" in kdcore("distill", "--help").out


def test_an_unknown_command_may_be_that_of_a_plugin_that_did_not_load(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    fake.install(site, "greetings", fake.IMPORT_ERROR)
    installed.load(fake.entries(site))
    said = kdcore("greet")
    assert "warning: plugin 'greetings' of greetings 1.0 failed to load" in said.err
    assert "error: No such command 'greet'" in said.err


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "peft")


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list", "--json"], ["--version"]])
def test_declaring_and_listing_import_nothing_heavy(arguments: list[str]) -> None:
    done = in_a_new_process(
        f"""
import sys
from kdcore_cli.main import run
code = run({arguments})
print("heavy:", [name for name in {HEAVY} if name in sys.modules], "code:", code)
"""
    )
    assert done.stdout.splitlines()[-1] == "heavy: [] code: 0", done.stderr


def test_no_colours_outside_a_terminal_nor_against_the_users_wish() -> None:
    done = in_a_new_process(
        "from kdcore_cli.main import run; run(['--help']); run(['check', 'none.yaml'])"
    )
    assert "\x1b" not in done.stdout + done.stderr
    forced = in_a_new_process(
        "from kdcore_cli.main import run; run(['check', 'none.yaml'])", FORCE_COLOR="1"
    )
    assert "\x1b" in forced.stderr


def test_the_shell_completes_commands() -> None:
    done = in_a_new_process(
        "from kdcore_cli.console_script import main; main()",
        _KDCORE_COMPLETE="complete_bash",
        COMP_WORDS="kdcore dis",
        COMP_CWORD="1",
    )
    assert done.stdout.strip() == "distill"


def test_strictness_turns_warnings_into_errors(tmp_path: Path) -> None:
    fake.install(tmp_path, "broken-plugin", fake.IMPORT_ERROR)
    code = "import sys; from kdcore_cli.main import run; sys.exit(run(['plugins', 'list']))"
    lenient = in_a_new_process(code, PYTHONPATH=str(tmp_path))
    assert lenient.returncode == 0
    assert "warning: plugin 'broken_plugin' of broken-plugin 1.0 failed to load" in lenient.stderr
    strict = in_a_new_process(code, PYTHONPATH=str(tmp_path), KDCORE_STRICT="1")
    assert strict.returncode == 2
    assert "error: plugin 'broken_plugin' of broken-plugin 1.0 failed to load" in strict.stderr


def test_a_fault_in_a_plugins_code_names_its_distribution() -> None:
    from kdcore.components.registry import installed
    from kdcore_speckd.gate import greedy

    with pytest.raises(AttributeError) as fault:
        greedy(None, 5)  # type: ignore[arg-type]
    assert installed().whose(fault.value) == f"kdcore {main.version('kdcore')}"
    with pytest.raises(ZeroDivisionError) as ours:
        _ = 1 / 0
    assert installed().whose(ours.value) == "kdcore or a plugin"


@pytest.mark.parametrize("option", ["--out", "--output", "-o"])
def test_the_file_of_a_schema_by_each_name_of_its_option(kdcore: Kdcore, option: str) -> None:
    assert kdcore("schema", option, "schema.json").code == 0
    assert json.loads(Path("schema.json").read_text())["$defs"]
    assert kdcore("schema", f"--output={option}.json").code == 0
    assert Path(f"{option}.json").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_written_has_one_name(kdcore: Kdcore, command: tuple[str, ...]) -> None:
    assert "--output" not in kdcore(*command, "--help").out


def test_log_messages_of_libraries_are_hidden_without_verbose(
    kdcore: Kdcore, caplog: pytest.LogCaptureFixture
) -> None:
    """By every command, also by those that have no --verbose."""
    library = logging.getLogger("some.library")
    before = logging.root.manager.disable
    try:
        logging.disable(logging.NOTSET)
        kdcore("doctor", "--verbose")
        library.warning("shown")
        kdcore("plugins", "list")
        library.warning("hidden")
        library.error("an error")
    finally:
        logging.disable(before)
    assert caplog.messages == ["shown", "an error"]


def test_the_conversion_of_a_gguf_file_shows_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    quieten(quiet=False, verbose=False)
    assert list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="tensors")) == [0, 1, 2]
    assert capfd.readouterr().err == ""
