"""A table in a terminal that is too narrow for it: its words stay whole, as lines if need be."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table
from rich.text import Text

from kdcore_cli.terminal.safe_console import SafeConsole
from kdcore_cli.terminal.tables import keep_together, table

PATH = "/a/" + "path/" * 12 + "end"


def printed(shown: Table, width: int) -> str:
    console = SafeConsole(file=io.StringIO())
    console.width = width
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def models() -> Table:
    shown = table("", "parameters", "layers", "classes", "from")
    shown.add_row("teacher", "134.5M", Text("30"), "49152", "some/model")
    shown.add_row("student", "99.1M", Text("20"), "", "a\x1b[2Jb")
    return shown


@pytest.mark.parametrize("width", [16, 20, 30, 40, 50, 60, 80])
def test_no_word_is_broken(width: int) -> None:
    text = printed(models(), width)
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("parameters", "layers", "classes", "134.5M", "49152", "some/model", r"a\x1b[2Jb"):
        assert re.search(rf"(^|\s){re.escape(word)}:?($|\s)", text, re.MULTILINE), (word, text)


def test_lines_have_the_headings_of_the_cells_that_are_not_blank() -> None:
    assert printed(models(), 20).split("student\n")[1] == (
        "  parameters: 99.1M\n  layers: 20\n  from: a\\x1b[2Jb\n"
    )


def test_without_headings_the_cells_are_below_the_first() -> None:
    facts = table("", "", show_header=False)
    facts.add_row("activations", "12,345 MiB/step")
    assert printed(facts, 20) == "activations\n  12,345 MiB/step\n"


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_path_does_not_turn_a_table_into_lines(width: int) -> None:
    shown = table("folder", "size")
    shown.add_row(PATH, "3 MiB")
    text = printed(shown, width)
    assert text.startswith("folder") and text.splitlines()[0].endswith("size")
    assert (
        "".join(
            line[:-5] if line.endswith("3 MiB") else line for line in text.splitlines()[1:]
        ).replace(" ", "")
        == PATH
    )


@pytest.mark.parametrize("width", [44, 79, 80, 81, 120])
def test_an_interval_stays_on_one_line(width: int) -> None:
    """Also where the table takes all columns of the terminal, and loses none."""
    shown = table("arm", "accuracy against the labels", "minus kd [95 %]", "tokens", "memory")
    for name in ("gains_normalised", "deepkd"):
        shown.add_row(name, "77.7%", "-10.4 [-11.0, -9.8] pp", "144,476", "658 MiB")
    keep_together(shown.columns[2])
    lines = printed(shown, width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum("-10.4 [-11.0, -9.8] pp" in line for line in lines) == 2
    assert sum("658 MiB" in line for line in lines) == 2
