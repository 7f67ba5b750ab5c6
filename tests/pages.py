"""The pages of the documentation: their fenced blocks, and the command lines in these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "third_party_plugin"
PAGES = [ROOT / "README.md", EXAMPLE / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?:<!-- tested\n(?P<notes>(?:(?!-->)[^\n]+\n)+)-->\n+)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INCLUDED = re.compile(r"--8<--\n(.*)\n--8<--\n")


@dataclass(frozen=True)
class Command:
    """A line of a shell block. ``added`` is put behind it, or ``reason`` says why it is not run."""

    place: str
    line: str
    added: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    title: the file that the reader is to write it to. notes: what a comment in the page's source,
    right before a shell block, says of its commands, as (beginning of the line, remark). A remark
    is words to add where a test runs the line on models of no size, or ``not run: reason``.
    """

    page: Path
    line: int
    language: str
    text: str
    title: str
    notes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def whole(self) -> str:
        """The text, or that of the file which it includes."""
        included = INCLUDED.fullmatch(self.text)
        return (ROOT / included[1]).read_text() if included else self.text

    def commands(self) -> Iterator[Command]:
        """The lines of a shell block, without comments, continued ones in one piece."""
        unused = dict(self.notes)
        for line in self.text.replace("\\\n", " ").splitlines():
            line = " ".join(line.partition(" #")[0].split())
            if not line:
                continue
            said = [start for start, _ in self.notes if line.startswith(start)]
            remark = dict(self.notes)[max(said, key=len)] if said else ""
            for start in said:
                unused.pop(start, None)
            reason = remark.removeprefix("not run: ") if remark.startswith("not run: ") else ""
            yield Command(str(self), line, "" if reason else remark, reason)
        assert not unused, f"{self} has no command that begins with {list(unused)}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("language")) + 1
        yield Block(
            page, line, fence["language"], fence["text"], fence["title"] or "",
            tuple(_notes((fence["notes"] or "").splitlines())),
        )  # fmt: skip


def _notes(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``beginning of the line => remark``, one a line."""
    for line in lines:
        start, arrow, remark = line.partition(" => ")
        assert arrow and remark, f"not 'line => remark': {line}"
        yield start.strip(), remark.strip()


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
