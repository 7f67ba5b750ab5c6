"""No text from data, models or servers steers the terminal."""

from __future__ import annotations

import ast
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

import kdcore_cli
from kdcore.errors import UserError
from kdcore_cli.terminal.answer_text import AnswerText
from kdcore_cli.terminal.control_characters import escaped, escaped_json
from kdcore_cli.terminal.progress import Bars, Lines
from kdcore_cli.terminal.safe_console import SafeConsole
from kdcore_cli.terminal.tables import show_facts, table
from tests.cli.conftest import RESULTS, Kdcore
from tests.kdcore.specs.test_file import GOOD

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b2J\x7f\u202eb\ud800[red]c[/nothing]\n\td"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b2J\x7f\u202eb\ud800[red]c[/nothing]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def of_the_text(written: str) -> str:
    """What was written without the colours and cursor moves that rich adds."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", written)


def is_plain(text: str) -> bool:
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in text)


@given(st.text(st.characters(exclude_categories=())))
@settings(max_examples=200, derandomize=True)
def test_escapes_leave_no_control_character_and_all_the_rest(text: str) -> None:
    assert is_plain(escaped(text))
    said = json.dumps(text, ensure_ascii=False)
    assert is_plain(escaped_json(said))
    assert json.loads(escaped_json(said)) == text


@pytest.mark.parametrize(
    "shape",
    [
        str,
        lambda text: Text(text, "bold"),
        lambda text: Padding(text, 1),
        lambda text: Rule(text),
        lambda text: _row(text),
        lambda text: _row(Text.assemble(("label: ", "red"), text)),
    ],
)
@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_whatever_is_printed_shows_them(shape: Any, file: type[io.StringIO]) -> None:
    console = SafeConsole(file=file())
    console.width = 120
    console.print(shape(HOSTILE))
    written = of_the_text(console.file.getvalue())  # type: ignore[attr-defined]
    assert is_plain(written)
    # rich's Text drops the bell itself
    assert SHOWN in written or SHOWN.replace(r"\x07", "") in written


def _row(cell: Any) -> Any:
    rows = table("", HOSTILE)
    rows.add_row("", cell)
    return rows


@pytest.mark.parametrize("display", [Bars, Lines])
def test_stages_and_notes_show_them(display: Any) -> None:
    console = SafeConsole(file=Terminal())
    console.width = 200
    progress = display(console)
    with progress.stage(HOSTILE, 1) as stage:
        progress.note(HOSTILE)
        stage.advance()
    written = of_the_text(console.file.getvalue())  # type: ignore[attr-defined]
    assert is_plain(written)
    assert SHOWN + r"\n" in written, "on one line"


def test_a_style_stays_where_it_was() -> None:
    console = SafeConsole(file=Terminal())
    console.print(Text.assemble("plain\x00 ", ("bold\x01", "bold"), " plain"))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"plain\x00 " + "\x1b[1mbold" in written
    assert written.endswith(" plain\n")


def test_facts_with_brackets_are_no_markup() -> None:
    console = SafeConsole(file=io.StringIO())
    show_facts(console, {"model": "[/bold]", "[red]": 1})
    assert console.file.getvalue().split() == ["model", "[/bold]", "[red]", "1"]  # type: ignore[attr-defined]


def test_a_run_shows_those_of_its_prompts_answers_and_errors(
    kdcore: Kdcore, training: dict[str, Any]
) -> None:
    sample = {"prompt": HOSTILE, "teacher": HOSTILE, "after": HOSTILE}
    results = json.dumps(RESULTS | {"samples": [sample]})
    training["does"] = lambda run: run.write_text("results.json", results)
    said = kdcore("distill", "spec.yaml")
    assert said.code == 0
    assert is_plain(said.out)
    assert said.out.count(r"\x1b]0;title") == 3
    again = kdcore("evaluate", "runs/distill", "--json")
    assert is_plain(again.out)
    assert json.loads(again.out)["samples"] == [sample]

    def refuses(run: Any) -> None:
        raise UserError(f"the endpoint said {HOSTILE}", HOSTILE)

    training["does"] = refuses
    for extra in ((), ("--debug",)):
        said = kdcore("distill", "spec.yaml", "--overwrite", *extra)
        assert said.code == 2
        assert is_plain(said.err)
        assert r"the endpoint said a\x1b]0;title\x07" in said.err


def test_a_wrong_word_on_the_command_line_shows_them(kdcore: Kdcore, tmp_path: Path) -> None:
    Path("spec.yaml").write_text(GOOD)
    hostile = HOSTILE.replace("\ud800", "\udcff")  # how Python shows a byte that is not UTF-8
    for words in (
        ["check", HOSTILE],
        [HOSTILE],
        ["check", "--set", HOSTILE],
        ["check", "spec.yaml", "--set", f"{HOSTILE}=1"],
        ["check", "spec.yaml", "--set", f"teacher.model={HOSTILE}"],
        ["evaluate", hostile],
        ["report", hostile],
        ["init", "new.yaml", "--data", hostile],
        ["plugins", "show", hostile],
        ["generate", hostile],
    ):
        said = kdcore(*words)
        assert said.code == 2, words
        assert is_plain(said.err)
        labels = [line.split(":")[0] for line in said.err.splitlines()]
        assert labels == ["error", "  fix"], said.err


def test_nothing_is_printed_past_the_console() -> None:
    """But fixed words, and the answers of `generate`, which escape themselves."""
    folder = Path(kdcore_cli.__file__).parent
    printing = {
        file.name
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo")
    }
    assert printing == {
        *("answer_text.py", "console.py", "console_script.py", "generate_command.py")
    }
    made = {file.name for file in folder.rglob("*.py") if " Console(" in file.read_text("utf-8")}
    assert made == set()


class _Tokens:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("file", "expected"),
    [(Terminal, r"\x1b[2J" + "\n\td\r".replace("\r", r"\r")), (io.StringIO, "\x1b[2J\n\td\r")],
)
def test_an_answer_is_escaped_in_a_terminal_and_raw_in_a_file(
    file: type[io.StringIO], expected: str
) -> None:
    opened = file(newline="")
    text = AnswerText(opened, _Tokens())
    for character in "\x1b[2J\n\td\r":
        text.put([ord(character)])
    text.end()
    assert opened.getvalue() == expected + "\n"
