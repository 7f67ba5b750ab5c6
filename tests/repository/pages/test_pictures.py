"""The docs' pictures are those of their stored results."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.fixtures.pages import PAGES, ROOT

FOLDER = ROOT / "docs/pictures"
SCRIPT = runpy.run_path(str(FOLDER / "draw.py"))
NAMES = sorted(SCRIPT["PICTURES"])


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_not_older_than_its_results(name: str) -> None:
    figure = SCRIPT["figure_of"](SCRIPT["PICTURES"][name])
    drawn = (FOLDER / f"{name}.svg").read_text()
    said = f"<!-- figure {SCRIPT['digest'](figure)} -->"
    assert drawn.startswith(said), f"run: python docs/pictures/draw.py {name}"


@pytest.mark.needs("chromium")
def test_a_picture_shows_its_title_and_its_lines() -> None:
    figure = SCRIPT["figure_of"](SCRIPT["PICTURES"]["digits_gsnr"])
    drawn = SCRIPT["drawn"](figure)
    assert "Gradient signal-to-noise ratio of each term" in drawn
    legend = re.findall(r'<text class="legendtext".*?>(.*?)</text>', drawn)
    assert legend == [trace["name"] for trace in figure["data"]]
    assert drawn == SCRIPT["drawn"](figure)


def test_each_picture_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    for file in FOLDER.glob("*.svg"):
        assert f"pictures/{file.name}" in pages, file.name


def test_stored_results_say_nothing_of_a_machine() -> None:
    for file in (FOLDER / "results").rglob("*"):
        if file.is_file():
            assert not re.search(r'[" ]/(home|root|tmp|work|Users)/', file.read_text()), file
