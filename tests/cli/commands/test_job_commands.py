"""Commands made from the table of jobs, of a plugin's jobs."""

from __future__ import annotations

from pathlib import Path

from kdcore.components.registry import Registry
from tests.cli.conftest import Kdcore
from tests.fixtures import fake_distributions as fake

COUNT = """
from typing import Literal
from kdcore.components.hookspecs import hookimpl
from kdcore.components.job import Job
from kdcore.specs.parts.fields import SpecModel

class Spec(SpecModel):
    job: Literal["{name}"]
    words: list[str]

def work(spec, *, registry, progress):
    return {{"words": len(spec.words), "first": spec.words[0]}}

@hookimpl
def kdcore_jobs():
    yield Job(name="{name}", summary="Count words.", model="job_plugin:Spec",
              work="job_plugin:work", run_folder=False)
"""


def test_a_job_without_a_run_folder_shows_what_it_returns(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    fake.install(site, "job-plugin", COUNT.format(name="count"))
    installed.load(fake.entries(site))
    shown = kdcore("count", "--help").out
    assert "For example:\n\n  kdcore count spec.yaml" in shown
    assert "--set" in shown and "--out" not in shown and "--resume" not in shown
    Path("spec.yaml").write_text("job: count\nwords: [a, b]\n")
    assert kdcore("count", "spec.yaml", "--json").out == '{\n  "words": 2,\n  "first": "a"\n}\n'
    assert kdcore("count", "spec.yaml").out.split() == ["words", "2", "first", "a"]
    other = kdcore("distill", "spec.yaml")
    assert other.code == 2
    assert "spec.yaml is a spec of the job count, not distill" in other.err


def test_a_job_with_the_name_of_a_command_leaves_the_command_alone(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    fake.install(site, "job-plugin", COUNT.format(name="doctor"))
    installed.load(fake.entries(site))
    assert "Count words." not in kdcore("doctor", "--help").out
    assert "its command 'doctor' already exists in kdcore" in kdcore("plugins", "list").err
