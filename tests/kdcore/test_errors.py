"""A mistake keeps the field of the spec that it is about."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest

from kdcore.errors import (
    Mistakes,
    UserError,
    counted,
    first_line,
    in_field,
    not_utf8,
    one_line,
    unreadable,
)


@pytest.mark.parametrize(("own", "found"), [("", "data.train"), ("data.train.path", None)])
def test_a_mistake_gets_the_field_that_is_read_unless_it_names_one(
    own: str, found: str | None
) -> None:
    with pytest.raises(UserError) as caught, in_field("data"), in_field("data.train"):
        raise UserError("rows.jsonl is empty", "choose another file", own)
    assert caught.value.field == (found or own)


def test_it_keeps_the_field_on_its_way_out_of_a_process() -> None:
    sent = copy.copy(UserError("cause", "cure", "seed"))  # by what pickling would use
    assert (sent.cause, sent.cure, sent.field) == ("cause", "cure", "seed")


def test_a_notebook_shows_the_lines_of_the_command_line() -> None:
    """IPython calls this method in place of formatting the traceback."""
    both = Mistakes([UserError("a", "do b"), UserError("c", "do d")])
    assert both._render_traceback_() == ["error: a", "error: c", "  fix: do b", "  fix: do d"]


def test_an_exception_without_a_text_is_named() -> None:
    """Libraries raise some, and a message that quotes them must not fail itself."""
    found = [first_line(each) for each in (OSError(), ValueError("\n"), ValueError("a\nb"))]
    assert found == ["OSError", "ValueError", "a"]
    assert first_line(ValueError("long"), 3) == "lon"


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    name = "a\nb\r\x0b\x0c\x1c\x85\u2028\u2029c"
    assert len(one_line(name).splitlines()) == 1 and one_line("a\tb c") == "a\tb c"
    wrong = UserError(f"{name} does not exist", f"remove {name}")
    assert wrong.cause.startswith(r"a\nb\r\x0b") and len(str(wrong).splitlines()) == 2


def test_several_mistakes_are_a_line_each_and_a_cure_that_they_share_is_said_once() -> None:
    found = [UserError("a\nb", "one"), UserError("c", "two"), UserError("d", "one")]
    sent = copy.copy(Mistakes(found, 2))
    assert sent.cause == "a\\nb\nc\nd\n... and 2 more mistakes"
    assert sent.cure == "one\ntwo" and str(sent) == f"{sent.cause}\n{sent.cure}"
    assert sent.found == tuple(found)


def _reading(path: Path) -> OSError:
    with pytest.raises(OSError) as raised:
        path.read_bytes()
    return raised.value


def test_the_cure_of_a_file_that_cannot_be_read_fits_the_reason(tmp_path: Path) -> None:
    def said(path: Path, fault: OSError) -> tuple[str, str]:
        told = unreadable(path, fault, "the spec's folder")
        return told.cause, told.cure

    gone, link, own = tmp_path / "gone", tmp_path / "link", tmp_path / "my rows"
    link.symlink_to("gone")
    missing = "No such file or directory"
    assert said(gone, _reading(gone)) == (
        f"{gone} cannot be read: {missing}",
        "check the path, which is relative to the spec's folder",
    )
    cause, cure = said(link, _reading(link))
    assert cause == f"{link} cannot be read: it is a link to gone, which does not exist"
    assert cure == "restore that file, or name another one"
    assert said(tmp_path, _reading(tmp_path))[1] == "name a file in this folder"
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root may read all
    assert said(own, denied)[1] == f"let its owner permit it: chmod +r '{own}'"
    assert said(own, OSError(errno.EIO, "Input/output error"))[1].startswith("check the disk")
    assert said(own, OSError("no reason of the system")) == (
        f"{own} cannot be read: no reason of the system",
        "check the disk, or copy the file again",
    )


@pytest.mark.parametrize(
    ("content", "cause", "cure"),
    [
        (
            b"caf\xe9 au lait",
            "invalid continuation byte",
            "-f CP1252 -t UTF-8 data/a.csv > data/a.utf8.csv",
        ),
        ("q,a".encode("utf-16"), "it is in UTF-16", "iconv -f UTF-16 -t UTF-8 data/a.csv > "),
        ("caf\xe9".encode()[:-1], "ends inside a character", "copy it again: its end is missing"),
    ],
)
def test_the_cure_of_a_file_in_another_encoding_can_be_typed(
    content: bytes, cause: str, cure: str
) -> None:
    with pytest.raises(UnicodeDecodeError) as raised:
        content.decode()
    told = not_utf8(Path("data/a.csv"), raised.value)
    assert cause in told.cause and cure in told.cure
