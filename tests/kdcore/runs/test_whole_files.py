"""An output that several processes write is that of one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdcore.errors import UserError
from kdcore.runs import whole_files
from kdcore.runs.whole_files import beside, new_folder, refuse_existing, whole, write_text

_WAITS = """
import sys
from pathlib import Path
from kdcore.runs.whole_files import new_folder
with new_folder(Path(sys.argv[1])) as place:
    (place / "theirs").write_text("one")
    print("begun", flush=True)
    sys.stdin.readline()
    (place / "more").write_text("two")
"""
_REPEATS = """
import sys
from pathlib import Path
from kdcore.runs.whole_files import write_text
print("begun", flush=True)
while not Path(sys.argv[3]).exists():
    write_text(Path(sys.argv[1]), [sys.argv[2] * 1000] * 100)
"""


@contextmanager
def process(text: str, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", text, *map(str, words)]
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout and other.stdout.readline() == "begun\n"
        try:
            yield other
        finally:
            other.kill()


def test_of_two_processes_one_creates_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_PATIENCE", 0.1)
    folder = tmp_path / "out"
    with process(_WAITS, folder) as other:
        refused = pytest.raises(UserError, match=f"another process is writing {folder}\n")
        with refused, new_folder(folder):
            pytest.fail("the folder is another's")
        other.communicate("go on\n")
        assert other.returncode == 0
    assert sorted(each.name for each in folder.iterdir()) == ["more", "theirs"]
    with pytest.raises(UserError, match="already exists"), new_folder(folder):
        pytest.fail("the folder exists")
    assert [*tmp_path.iterdir()] == [folder]


def test_a_folder_of_a_killed_process_is_taken_over_and_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with process(_WAITS, folder) as other:
        (beside(folder) / "deep").mkdir()
        (beside(folder) / "deep" / "link").symlink_to(tmp_path)
        (beside(folder) / "away").symlink_to(tmp_path)
        other.kill()
        other.wait()
    with new_folder(folder) as place:
        (place / "ours").touch()
    assert [each.name for each in folder.iterdir()] == ["ours"]
    assert [*tmp_path.iterdir()] == [folder]


def test_what_else_bears_the_temporary_name_is_removed(tmp_path: Path) -> None:
    beside(tmp_path / "folder").write_text("a file")
    os.mkfifo(beside(tmp_path / "file"))
    with new_folder(tmp_path / "folder") as place:
        (place / "ours").touch()
    write_text(tmp_path / "file", "a" * 100_000)  # more than a pipe holds
    assert (tmp_path / "file").stat().st_size == 100_000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("name", [".", "..", "in/..", "/"])
def test_a_folder_that_is_there_already_by_its_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not name a new folder"):
        refuse_existing(Path(name))


def test_a_folder_that_appears_meanwhile_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="already exists"), new_folder(folder) as place:
        (place / "ours").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert [each.name for each in folder.iterdir()] == ["theirs"]
    assert not beside(folder).exists()


def test_texts_that_two_processes_write_are_never_mixed(tmp_path: Path) -> None:
    file, enough = tmp_path / "out" / "file", tmp_path / "enough"
    file.parent.mkdir()
    with process(_REPEATS, file, "a", enough) as one, process(_REPEATS, file, "b", enough) as other:
        seen: list[str] = []
        while len(seen) < 50 or (set(seen) != {*"abc"} and len(seen) < 10_000):
            write_text(file, "c" * 100_000)
            text = file.read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1, "a mixture"
            seen.append(text[0])
        enough.touch()
        assert one.wait() == other.wait() == 0
    assert set(seen) == {*"abc"}, "the processes wrote at the same time"
    assert [*file.parent.iterdir()] == [file]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[str]:
        yield "half"
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "out", "before")
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "out", parts())
    assert (tmp_path / "out").read_text() == "before"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.parametrize("left", ["file", "folder", "link"])
@pytest.mark.parametrize("made", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_before_the_next_write(
    tmp_path: Path, left: str, made: str
) -> None:
    place, elsewhere = beside(tmp_path / "out"), tmp_path / "elsewhere"
    elsewhere.write_text("stays")
    if left == "folder":
        (place / "inner").mkdir(parents=True)
    elif left == "file":
        place.write_text("half")
    else:
        place.symlink_to(elsewhere)
    with whole(tmp_path / "out") as found:
        assert found == place and not os.path.lexists(place)
        found.mkdir() if made == "folder" else found.write_text("whole")
    assert (tmp_path / "out").is_dir() == (made == "folder") and elsewhere.read_text() == "stays"
