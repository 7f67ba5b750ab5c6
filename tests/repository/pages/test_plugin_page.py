"""The examples of docs/plugins.md: a drafter held to the kit, a family asked about its parts."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import kdcore.decoding
from kdcore.components.registry import registry_with
from kdcore.models import anatomy
from kdcore.testing import suite_of
from kdcore.testing.suite import checks
from tests.fixtures import fake_distributions as fake
from tests.fixtures.pages import BLOCKS, ROOT
from tests.kdcore.test_face import loaded_after
from tests.tiny.tiny_chat_models import saved, tiny_model

PAGE = ROOT / "docs" / "plugins.md"
FILES = {block.title: block.text for block in BLOCKS if block.page == PAGE and block.title}


def names_below(heading: str) -> list[str]:
    """The first cells of the table of a section."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^\| `(\w+)` \|", section, re.M)


def test_the_page_lists_the_parts_that_are_exported() -> None:
    assert sorted(names_below("Add a drafter")) == sorted(kdcore.decoding.__all__)


def test_importing_the_parts_package_loads_no_torch() -> None:
    assert not loaded_after("import kdcore.decoding") & {"torch", "transformers"}


def test_the_page_lists_every_function_of_the_anatomy() -> None:
    own = [
        name
        for name, function in inspect.getmembers(anatomy, inspect.isfunction)
        if function.__module__ == anatomy.__name__ and not name.startswith("_")
    ]
    assert sorted(names_below("Add a model family")) == own


def test_the_drafter_of_the_page_passes_the_kit(site: Path) -> None:
    fake.install(site, "ahead-plugin", FILES["ahead_plugin.py"])
    (site / "ahead_drafter.py").write_text(FILES["ahead_drafter.py"])
    registry = registry_with()
    registry.load(fake.entries(site))
    assert not [each for each in registry.problems if each.distribution == "ahead-plugin"]
    suite = suite_of(registry.component("drafter", "ahead"), registry=registry)
    assert checks(suite)
    for check in checks(suite):
        getattr(suite(), check)()


def test_the_family_s_questions_have_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(), tmp_path / "path/to/model")
    exec(compile(FILES["family.py"], "family.py", "exec", dont_inherit=True), {})  # noqa: S102
    assert "LayerFacts(" in capsys.readouterr().out
