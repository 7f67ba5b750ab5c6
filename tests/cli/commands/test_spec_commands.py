"""``kdcore init`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcore.components import registry
from kdcore.components.job import Job
from kdcore.components.registry import Registry
from kdcore.specs.jobs import JOBS
from kdcore.specs.reading.file import read_spec
from tests.cli.conftest import Kdcore
from tests.fixtures import fake_distributions as fake
from tests.kdcore.specs.test_file import BROKEN, GOOD


def test_init_does_not_overwrite_unasked(kdcore: Kdcore) -> None:
    wrote = "wrote spec.yaml, heldout.jsonl, prompts.jsonl; next: kdcore check spec.yaml\n"
    assert kdcore("init").out == wrote
    Path("spec.yaml").write_text("mine")
    Path("prompts.jsonl").write_text("mine too")
    said = kdcore("init")
    assert said.code == 2
    assert said.err.splitlines() == [
        "error: spec.yaml already exists",
        "  fix: name another file, or add --overwrite to replace it",
    ]
    assert Path("spec.yaml").read_text() == "mine"
    kept = "kept heldout.jsonl, prompts.jsonl, which already existed\n"
    assert (
        kdcore("init", "--overwrite").out
        == kept + "wrote spec.yaml; next: kdcore check spec.yaml\n"
    )
    assert Path("spec.yaml").read_text() != "mine"
    assert Path("prompts.jsonl").read_text() == "mine too"


def test_init_where_nothing_can_be_written(kdcore: Kdcore) -> None:
    said = kdcore("init", "nowhere/spec.yaml")
    assert said.code == 2
    assert "nowhere/spec.yaml cannot be written: No such file or directory" in said.err


def test_the_schema_opens_every_reference_into_what_is_installed(kdcore: Kdcore) -> None:
    schema = json.loads(kdcore("schema").out)
    text = json.dumps(schema)
    assert "x-kdcore-component" not in text
    gate = schema["$defs"]["gate"]["anyOf"]
    assert gate[0] == {"enum": ["all", "inverted", "random", "speckd"]}
    assert {"$ref": "#/$defs/gate.speckd"} in gate
    speckd = schema["$defs"]["gate.speckd"]
    assert speckd["properties"]["name"] == {"const": "speckd"}
    assert speckd["properties"]["k"]["minimum"] == 1
    assert schema["$defs"]["gate.inverted"]["properties"]["gate"]["$ref"] == "#/$defs/gate"
    defined = {f"#/$defs/{name}" for name in schema["$defs"]}
    referred = {word for word in text.split('"') if word.startswith("#/$defs/")}
    assert referred <= defined


def test_the_schema_goes_to_a_file(kdcore: Kdcore) -> None:
    assert kdcore("schema", "distill", "-o", "spec.schema.json").out == ""
    assert json.loads(Path("spec.schema.json").read_text())["title"] == "DistillSpec"
    again = kdcore("schema", "distill", "-o", "spec.schema.json")
    assert again.code == 2 and "spec.schema.json already exists" in again.err
    assert kdcore("schema", "bench", "-o", "spec.schema.json", "--overwrite").code == 0
    assert json.loads(Path("spec.schema.json").read_text())["title"] == "BenchSpec"
    nowhere = kdcore("schema", "distill", "-o", "nowhere/spec.schema.json")
    assert nowhere.code == 2 and "cannot be written" in nowhere.err


def test_params_without_a_schema_do_not_spoil_the_schema(
    kdcore: Kdcore, installed: Registry, site: Path
) -> None:
    source = """
    from collections.abc import Callable
    from pydantic import BaseModel
    from kdcore.components.component import Component
    from kdcore.components.hookspecs import hookimpl

    class Params(BaseModel):
        model_config = {"extra": "forbid"}
        function: Callable[[int], int]

    @hookimpl
    def kdcore_components():
        made = {"build": "nowhere:Gate", "summary": "summary", "source": "source"}
        return [Component(kind="gate", name="odd", params=Params, **made)]
    """
    fake.install(site, "odd-plugin", source)
    installed.load(fake.entries(site))
    schema = json.loads(kdcore("schema").out)
    assert "no schema" in schema["$defs"]["gate.odd"]["$comment"]


@pytest.mark.parametrize("mistake", sorted(BROKEN))
@pytest.mark.parametrize("command", ["check", "distill"])
def test_a_broken_spec_is_code_2_without_a_traceback(
    kdcore: Kdcore, command: str, mistake: str
) -> None:
    (old, new), cause, cure = BROKEN[mistake]
    Path("spec.yaml").write_text(GOOD.replace(old, new))
    said = kdcore(command, "spec.yaml")
    assert (said.code, said.out) == (2, "")
    first, second = said.err.splitlines()
    assert first == f"error: {cause}"
    assert second.startswith(f"  fix: {cure}")


@pytest.mark.parametrize("job", JOBS.values(), ids=lambda job: job.name)
def test_a_starter_is_a_spec_of_its_job(job: Job, tmp_path: Path) -> None:
    for name, text in job.starter().items():
        (tmp_path / name).write_text(text)
    spec = read_spec(tmp_path / f"{job.name}.yaml", [], registry=registry.installed())
    assert isinstance(spec, job.spec)
