"""``kdcore plugins``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcore.components.registry import Foreign, Registry
from tests.cli.conftest import Kdcore
from tests.fixtures import fake_distributions as fake
from tests.fixtures.pages import BLOCKS


def test_list_shows_every_component_with_its_distribution(kdcore: Kdcore) -> None:
    said = kdcore("plugins", "list")
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[0] == ["kind", "name", "summary", "from"]
    assert ["gate", "speckd", "a", "toy", "gate", "toys", "1.0"] in rows
    assert max(map(len, said.out.splitlines())) <= 80


def test_list_of_one_kind_as_json(kdcore: Kdcore) -> None:
    data = json.loads(kdcore("plugins", "list", "--kind", "divergence", "--json").out)
    assert [entry["name"] for entry in data["components"]] == ["forward_kl", "skew"]
    assert data["components"][0]["distribution"] == "toys"


def test_list_tells_what_did_not_load_and_what_is_for_another_version(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    fake.install(site, "broken-plugin", fake.IMPORT_ERROR)
    installed.load(fake.entries(site))
    installed.foreign.append(Foreign("late", "kdcore.v2", "late-plugin", "3.0"))
    said = kdcore("plugins", "list")
    assert said.err.splitlines() == [
        "warning: plugin 'broken_plugin' of broken-plugin 1.0 failed to load: "
        "ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
        "not loaded: plugin 'late' of late-plugin 3.0 requires API kdcore.v2; this is kdcore.v1",
    ]
    data = json.loads(kdcore("plugins", "list", "--json").out)
    assert data["problems"][0]["distribution"] == "broken-plugin"
    assert data["other_api_versions"][0]["group"] == "kdcore.v2"


def test_show_has_parameters_documentation_and_origin(kdcore: Kdcore) -> None:
    said = kdcore("plugins", "show", "speckd")
    assert said.code == 0
    for phrase in (
        "speckd, a gate: a toy gate",
        "toys 1.0",
        "tests.tiny.toy_components:Speckd",
        "integer >= 1",
        '"greedy" or "sampling"',
        "how many of the teacher's tokens count",
        "Accepts what the teacher would have",
    ):
        assert phrase in " ".join(said.out.split())
    assert max(map(len, said.out.splitlines())) <= 80


def test_show_as_json(kdcore: Kdcore) -> None:
    data = json.loads(kdcore("plugins", "show", "speckd", "--json").out)
    assert data["parameters"][1] == {
        "name": "beta",
        "type": "float >= 0 <= 1",
        "default": "0.01",
        "description": "weight of a refused position",
    }
    needed = json.loads(kdcore("plugins", "show", "random", "--json").out)["parameters"]
    assert needed[0]["default"] is None
    nested = json.loads(kdcore("plugins", "show", "inverted", "--json").out)["parameters"]
    assert nested[0]["type"] == "gate"
    schedule = json.loads(kdcore("plugins", "show", "skew", "--json").out)["parameters"]
    assert schedule[0]["type"] == "float or list of list of float"


def test_show_of_a_component_that_cannot_be_imported_still_shows_it(kdcore: Kdcore) -> None:
    said = kdcore("plugins", "show", "random")
    assert said.code == 0
    assert "share of positions" in said.out
    assert "gate 'random' of toys 1.0 cannot be imported: AttributeError" in said.err


def test_a_name_of_two_kinds_asks_which(kdcore: Kdcore, installed: Registry, site: Path) -> None:
    fake.install(site, "more-plugin", fake.component("speckd", kind="verifier"))
    installed.load(fake.entries(site))
    said = kdcore("plugins", "show", "speckd")
    assert said.code == 2
    assert "'speckd' exists as gate and verifier" in said.err
    assert "add --kind gate or --kind verifier" in said.err
    assert "a verifier: summary" in kdcore("plugins", "show", "speckd", "--kind", "verifier").out


def test_a_component_that_two_distributions_claim_names_both(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    fake.install(site, "other-plugin", fake.component("speckd"))
    installed.load(fake.entries(site))
    said = kdcore("plugins", "show", "speckd")
    assert said.code == 2
    assert "gate 'speckd' is declared by both toys 1.0 and other-plugin 1.0" in said.err


def test_the_command_of_the_page_works(kdcore: Kdcore, installed: Registry, site: Path) -> None:
    (example,) = [block for block in BLOCKS if block.title == "longest_prompts.py"]
    fake.install(site, "longest-prompts", example.text)
    installed.load(fake.entries(site))
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "abc"}\n{"prompt": "ab"}\n')
    said = kdcore("longest-prompts", "rows.jsonl", "--count", "2")
    assert (said.code, said.out) == (0, "abc\nab\n")
    refused = kdcore("longest-prompts", "none")
    assert refused.code == 2
    assert refused.err == "error: none does not exist\n  fix: check the path\n"
    assert "Show the longest prompts" in kdcore("--help").out


@pytest.mark.parametrize("kind", ["job", "gat"])
def test_a_kind_without_a_template_gets_those_that_have_one(kdcore: Kdcore, kind: str) -> None:
    said = kdcore("plugins", "new", "mine", "--kind", kind)
    assert said.code == 2
    cause, cure = said.err.splitlines()
    assert cause == f"error: kind '{kind}' does not have a template"
    assert cure.count("gate") == 1


def test_new_names_each_file_that_it_wrote_in_a_line(kdcore: Kdcore) -> None:
    said = kdcore("plugins", "new", "fresh-gate", "--kind", "gate")
    *files, following = said.out.splitlines()
    written = [str(file) for file in Path("fresh-gate").rglob("*") if file.is_file()]
    assert sorted(files) == sorted(f"wrote {file}" for file in written)
    assert following == "next: pip install -e fresh-gate && kdcore plugins check fresh-gate"
