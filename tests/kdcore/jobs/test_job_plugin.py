"""A job of somebody else's package: pip installs it, and every command that reads jobs has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures.clean_environment import INSTALL, Python, environment
from tests.fixtures.processes.forked import KDCORE
from tests.tiny.tiny_chat_models import saved, tiny_model

EXAMPLE = Path(__file__).parents[3] / "examples" / "plugins" / "token_count"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs Python in an environment that has the plugin."""
    run = environment(tmp_path_factory.mktemp("environment"))
    run(*INSTALL, EXAMPLE)
    return run


def test_its_command_stands_beside_ours(python: Python) -> None:
    listed = python("-c", KDCORE, "--help")
    assert "count-tokens" in listed and "Count the tokens of a data source." in listed
    shown = python("-c", KDCORE, "count-tokens", "--help")
    options = ("--set", "--out", "--overwrite", "--resume", "--quiet", "--verbose", "--json")
    assert all(option in shown for option in options)
    assert "The run folder then contains counts.json." in shown


def test_its_distribution_and_the_fields_of_its_spec_are_shown(python: Python) -> None:
    listed = json.loads(python("-c", KDCORE, "plugins", "list", "--json"))
    assert listed["problems"] == []
    origin = {job["name"]: job["distribution"] for job in listed["jobs"]}
    assert origin["count-tokens"] == "token-count" and origin["distill"] == "kdcore"
    shown = json.loads(python("-c", KDCORE, "plugins", "show", "count-tokens", "--json"))
    fields = [field["name"] for field in shown["fields"]]
    assert fields == ["job", "run", "source", "tokenizer", "max_length"]
    assert "token-count 0.2.0" in python("-c", KDCORE, "plugins", "show", "count-tokens")


def test_its_schema_is_open_into_the_installed_sources(python: Python) -> None:
    schema = json.loads(python("-c", KDCORE, "schema", "count-tokens"))
    assert schema["properties"]["source"]["$ref"] == "#/$defs/source"
    assert "source.chat" in schema["$defs"]


def test_from_its_starter_to_its_counts(python: Python, tmp_path: Path) -> None:
    model = saved(tiny_model(), tmp_path / "model")
    given = ("--set", f"tokenizer.model={model}")
    wrote = python("-c", KDCORE, "init", "counts.yaml", "--job", "count-tokens", cwd=tmp_path)
    assert wrote == ("wrote counts.yaml, conversations.jsonl; next: kdcore check counts.yaml\n")
    checked = python("-c", KDCORE, "check", "counts.yaml", *given, "--json", cwd=tmp_path)
    assert json.loads(checked) == {"source": "chat", "rows": 2, "tokenizer": str(model)}
    line = ("-c", KDCORE, "count-tokens", "counts.yaml", *given)
    counts = json.loads(python(*line, "--json", "--quiet", cwd=tmp_path))
    run = tmp_path / "runs" / "counts"
    assert counts == json.loads((run / "counts.json").read_text())
    assert counts["rows"] == 2 and counts["cut_rows"] == 0
    assert 0 < counts["learned"] < counts["tokens"] <= 2 * counts["longest"]
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "done"
    assert facts["plugins"]["token-count:token_count"] == "token-count==0.2.0"
    short = python(*line, "--set", "max_length=8", "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(short)["cut_rows"] == 2 and json.loads(short)["tokens"] <= 16


def test_it_is_not_in_the_project_itself() -> None:
    from kdcore.components.registry import installed

    assert "count-tokens" not in installed().names("job")


def test_its_own_tests_pass(python: Python) -> None:
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE)
    assert "1 passed" in said.splitlines()[-1]
