"""Every command of README and docs is run, page by page and in order, as a reader would.

Models and numbers are small (see `tests.fixtures.reader`). What else differs from what a reader
types is in the page's source, in a comment before the block (see `tests.fixtures.pages`): words
that are added, or why a command is not run. Those are still parsed, by the real command line.
"""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup

from kdcore_cli.main import application
from tests.fixtures.pages import BLOCKS, PAGES, ROOT, Command
from tests.fixtures.reader import Reader

OURS = ("kdcore ", "torchrun ")
"""How a line begins that is run, if nothing says why not; `make` has tests of its own."""

SHELL = [block for block in BLOCKS if block.language == "sh"]
COMMANDS = [command for block in SHELL for command in block.commands()]
INLINE = {
    (str(page.relative_to(ROOT)), " ".join(line.split()))
    for page in PAGES
    for line in re.findall(
        r"`((?:kdcore|make) [^`]+)`", re.sub(r"^```.*$", "", page.read_text(), flags=re.MULTILINE)
    )
}
"""(page, line) of what stands in backticks within a text: too short of words to be run."""
APPLICATION = functools.cache(application)
RUN = [page for page in PAGES if any(block.page == page for block in SHELL)]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_do_what_it_says(page: Path, reader: Reader) -> None:
    own = [block for block in BLOCKS if block.page == page]
    for block in own:
        if block.title:
            reader.writes(block)
    for line, command in _lines(page).items():
        said = reader.types(line)
        assert said.code == 0, f"{command.place}: {command.line}\n{said.err}"


def _lines(page: Path) -> dict[str, Command]:
    """What the reader types on a page, in order."""
    return {
        f"{command.line} {command.added}": command
        for block in SHELL
        if block.page == page
        for command in block.commands()
        if not command.reason and command.line.startswith(OURS)
    }


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda each: " ".join(filter(None, [each.line, each.reason]))
)
def test_a_command_exists_or_a_page_says_why_it_is_not_run(command: Command) -> None:
    if command.line.split()[0] in ("kdcore", "make"):
        parse(command.line)
    if not command.line.startswith((*OURS, "make")):
        assert command.reason, f"{command.place}: why is '{command.line}' not run?"


@pytest.mark.parametrize(("page", "line"), sorted(INLINE))
def test_a_command_within_a_text_exists(page: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_path_of_the_repository_exists(page: Path) -> None:
    """Also one in a command that is not run, or in the reason for it."""
    named = re.findall(
        r"(?<![\w/.-])(?:\./)?((?:examples|tests|benchmarks)/[\w./-]*\w)", page.read_text()
    )
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{page.relative_to(ROOT)} names {missing}"


def parse(line: str) -> None:
    """Raises what the command line raises for a command or an option that it does not have."""
    first, *words = shlex.split(line)
    if first == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    command: Any = APPLICATION()
    while isinstance(command, TyperGroup) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if words[:1] in (["--help"], ["--version"]):
        return
    if words:
        assert not isinstance(command, TyperGroup), f"there is no command {words[0]}"
        command.make_context("kdcore", words)
