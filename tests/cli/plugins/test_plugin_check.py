"""``kdcore plugins check`` of what declares jobs and commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdcore.components.registry import Registry
from kdcore.testing.suite import imports_torch
from tests.cli.conftest import Kdcore
from tests.fixtures import fake_distributions as fake

SOURCE = """
from pathlib import Path
from typing import Literal
{more}
from kdcore.components.hookspecs import hookimpl
from kdcore.components.job import Job
from kdcore.specs.parts.fields import SpecModel

class Spec(SpecModel):
    job: Literal["{named}"]
    run: Path = Path("runs/count")
    words: {words}
    least: int = 1

def work(spec, *, registry, progress, overwrite{resume}):
    raise AssertionError("a check carries nothing out")

def preflight(spec, *, registry):
    if len(spec.words) < spec.least:
        raise ValueError("too few words")
    return {report}

@hookimpl
def kdcore_jobs():
    yield Job(name="count", summary="Count words.", model="job_plugin:Spec",
              work="job_plugin:work", preflight="job_plugin:preflight",
              template="count_starter:count.yaml")
"""
GOOD = {
    "more": "",
    "named": "count",
    "words": "list[str]",
    "resume": ", resume",
    "report": "{'words': len(spec.words)}",
    "starter": "job: count\nwords: [a, b]\n",
}


@pytest.fixture
def checked(kdcore: Kdcore, installed: Registry, site: Path) -> Any:
    """Installs the plugin, checks it, and gives the failed checks with their reasons."""

    def check(*arguments: str, code: int = 0, **changes: str) -> dict[str, str]:
        imports_torch.cache_clear()  # the module is another one in each test
        given = GOOD | changes
        (site / "count_starter").mkdir()
        (site / "count_starter" / "count.yaml").write_text(given.pop("starter"))
        fake.install(site, "job-plugin", SOURCE.format(**given))
        installed.load(fake.entries(site))
        said = kdcore("plugins", "check", "job-plugin", "--json", *arguments)
        assert said.code == code, said.err
        outcome = json.loads(said.out)
        assert len(outcome) == 9
        return {each["check"]: each["reason"] for each in outcome if not each["passed"]}

    return check


def test_a_job_that_is_as_it_should_be_passes(checked: Any, kdcore: Kdcore) -> None:
    assert checked() == {}
    said = kdcore("plugins", "check", "job-plugin")
    assert "9 passed, 0 failed" in said.out and "job count" in said.out
    assert "command count" in said.out


@pytest.mark.parametrize(
    ("changes", "check", "reason"),
    [
        ({"more": "import torch"}, "declaring_it_imports_no_torch", "job_plugin imports torch"),
        (
            {"starter": "job: count\nwords: [a]\nwrod: 3\n"},
            "its_starter_is_a_spec_of_it",
            "count.yaml:3: wrod: unknown key",
        ),
        (
            {"resume": ""},
            "what_carries_it_out_takes_what_it_is_given",
            "cannot be called with (spec, registry=, progress=, overwrite=, resume=)",
        ),
        ({"report": "3"}, "its_preflight_runs_on_the_starter", "the preflight returned a int"),
        (
            {"starter": "job: count\nwords: []\n"},
            "its_preflight_runs_on_the_starter",
            "ValueError: too few words",
        ),
        (
            {"named": "tally"},
            "its_spec_is_a_spec_model_that_names_it",
            'job_plugin:Spec.job must be Literal["count"]',
        ),
        (
            {"more": "from collections.abc import Callable", "words": "Callable"},
            "its_schema_can_be_made",
            "PydanticInvalidForJsonSchema",
        ),
    ],
)
def test_what_is_wrong_with_a_job_is_told(
    checked: Any, changes: dict[str, str], check: str, reason: str
) -> None:
    failed = checked(code=1, **changes)
    assert reason in failed[f"test_{check}"]


def test_a_field_of_the_starter_is_set(checked: Any) -> None:
    failed = checked("--set", "job.count.least=3", code=1)
    (reason,) = failed.values()
    assert list(failed) == ["test_its_preflight_runs_on_the_starter"]
    assert re.fullmatch(r"ValueError: too few words \(job_plugin, line \d+\)", reason)


def test_an_assignment_for_another_job_is_refused(
    kdcore: Kdcore, installed: Registry, checked: Any
) -> None:
    assert checked() == {}
    said = kdcore("plugins", "check", "job-plugin", "--set", "job.conut.least=3")
    assert said.code == 2 and "the plugin does not declare job 'conut'" in said.err


def test_a_job_with_the_name_of_a_command_is_told(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    source = SOURCE.format(**GOOD).replace('name="count"', 'name="doctor"')
    fake.install(site, "job-plugin", source)
    installed.load(fake.entries(site))
    said = kdcore("plugins", "check", "job-plugin", "--json")
    assert said.code == 1
    failed = [each for each in json.loads(said.out) if each["kind"] == "command"]
    assert [each["check"] for each in failed] == ["test_its_commands_are_added"]
    assert "its command 'doctor' already exists in kdcore" in failed[0]["reason"]


COMMANDS = """
from kdcore.components.hookspecs import hookimpl

@hookimpl
def kdcore_commands(app):
    @app.command()
    def told():
        "Say something."

    @app.command()
    def untold():
        pass
"""


def test_commands_have_a_help(kdcore: Kdcore, installed: Registry, site: Path) -> None:
    fake.install(site, "commands-plugin", COMMANDS)
    installed.load(fake.entries(site))
    said = kdcore("plugins", "check", "commands-plugin", "--json")
    assert said.code == 1
    outcome = {(each["name"], each["check"]): each for each in json.loads(said.out)}
    help_made = "test_its_help_can_be_made"
    assert outcome["commands_plugin", "test_its_commands_are_added"]["passed"]
    assert outcome["told", help_made]["passed"]
    assert outcome["untold", help_made]["reason"].startswith("it has no help")


def test_a_plugin_that_declares_none_of_them_has_nothing_to_check(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    hook = "from kdcore import hookimpl\n\n@hookimpl\ndef {}(run): ...\n"
    fake.install(site, "hooks-plugin", hook.format("kdcore_run_started"))
    installed.load(fake.entries(site))
    said = kdcore("plugins", "check", "hooks-plugin")
    assert said.code == 2
    assert "does not declare a component, job or command" in said.err
