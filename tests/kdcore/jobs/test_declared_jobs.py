"""The table of jobs: what may be declared, and what becomes of a job that is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.specs.jobs import JOBS
from tests.fixtures import fake_distributions as fake
from tests.tiny.toy_components import registry as toys

DECLARED = """
from kdcore.components.hookspecs import hookimpl
from kdcore.components.job import Job

def job(**other):
    given = {{"name": "count", "summary": "s", "model": "nowhere:Spec", "work": "nowhere:work"}}
    return Job(**(given | other))

@hookimpl
def kdcore_jobs():
    return [{jobs}]
"""

BROKEN = {
    "no job": ("'count'", "which is not a Job"),
    "bad name": ("job(name='Count it')", "is not a valid name of a job"),
    "bad place": ("job(work='nowhere.work')", "work of job 'count' must have the form"),
    "bad template": ("job(template='starter.yaml')", "template of job 'count' must have the form"),
    "twice": ("job(), job()", "declares job 'count' twice"),
    "taken": ("job(name='distill')", "job 'distill' is declared by both"),
}


def with_jobs(site: Path, jobs: str) -> Registry:
    fake.install(site, "job-plugin", DECLARED.format(jobs=jobs))
    registry = toys()
    registry.load(fake.entries(site))
    return registry


@pytest.mark.parametrize("fault", BROKEN)
def test_a_badly_declared_job_is_a_problem_of_its_plugin(site: Path, fault: str) -> None:
    jobs, reason = BROKEN[fault]
    registry = with_jobs(site, jobs)
    (problem,) = registry.problems
    assert problem.distribution == "job-plugin" and reason in problem.reason
    assert [job.name for job, _ in registry.jobs()] == list(JOBS)


def test_a_name_that_two_declare_is_refused_with_both(site: Path) -> None:
    with pytest.raises(UserError, match=r"declared by both toys 1\.0 and job-plugin 1\.0"):
        with_jobs(site, "job(name='distill')").job("distill")


def test_an_unknown_job_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        toys().job("distil")
    assert caught.value.cause == "unknown job 'distil'"
    assert caught.value.cure == "did you mean 'distill'?"


def test_a_job_that_cannot_be_imported_says_so_when_it_is_asked_for(site: Path) -> None:
    registry = with_jobs(site, "job(), job(name='dict', model='builtins:dict')")
    assert registry.problems == []
    with pytest.raises(UserError, match="nowhere:Spec cannot be imported: ModuleNotFoundError"):
        _ = registry.job("count").spec
    with pytest.raises(UserError, match="builtins:dict is not a pydantic model"):
        _ = registry.job("dict").spec
    with pytest.raises(UserError, match="job 'count' has no spec to begin from"):
        registry.job("count").starter()


def test_a_spec_model_without_a_run_folder_is_refused(site: Path) -> None:
    evaluate = "kdcore.specs.evaluate:EvaluateSpec"
    registry = with_jobs(
        site,
        f"job(model='{evaluate}'), job(name='no-folder', model='{evaluate}', run_folder=False)",
    )
    with pytest.raises(UserError, match="EvaluateSpec lacks the field 'run'"):
        _ = registry.job("count").spec
    assert registry.job("no-folder").spec.__name__ == "EvaluateSpec"
