"""A comparison of a plugin's own job, and jobs that cannot be compared."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdcore.components.registry import Registry, installed, registry_with
from kdcore.errors import UserError
from kdcore.specs.json_schema import json_schema
from kdcore.specs.reading.file import validate_spec
from kdcore_cli.terminal.check_report import report_of
from tests.fixtures import fake_distributions as fake
from tests.fixtures.processes.forked import kdcore

installed()  # read before a test installs something, and then kept

FIT = """
from pathlib import Path
from typing import Literal

from kdcore import hookimpl
from kdcore.components.job import Job
from kdcore.specs.parts.fields import Seed, SpecModel
from kdcore.specs.parts.training import RowsSpec

class FitSpec(SpecModel):
    job: Literal["fit"]
    run: Path = Path("runs/fit")
    seed: Seed = 0
    data: {data}
    offset: float = 0.0

def fit(spec, *, registry, progress=None, overwrite=False, resume=False):
    from kdcore.models.assembly import Assembly
    from kdcore.runs.folder import Run
    from kdcore.runs.results import (
        HELDOUT_ROWS, METRICS, TRAINING_RESULTS, HeldOutRows, Measured, TrainingResults,
    )

    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        rows = Assembly(registry).build(spec.data.heldout).read()
        sums = {{"teacher_kl": [spec.offset + spec.seed + len(str(each.id)) for each in rows]}}
        rows = Measured([1] * len(rows), sums)
        run.write(HELDOUT_ROWS, HeldOutRows(after=rows))
        run.write(TRAINING_RESULTS, TrainingResults(after=rows.means(), metrics=[METRICS[0]]))
    return run

def preflight(spec, *, registry):
    return {{"offset": spec.offset}}

@hookimpl
def kdcore_jobs():
    yield Job(name="fit", summary="Fit an offset.", model="fit_plugin:FitSpec",
              work="fit_plugin:fit", preflight={preflight}, comparable={comparable})
"""


def source(**given: Any) -> str:
    said = {"data": "RowsSpec", "preflight": "'fit_plugin:preflight'", "comparable": True}
    return FIT.format(**said | given)


def spec_of(folder: Path, **fields: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "response": c}) + "\n" for c in "abcd"))
    data = {name: {"name": "chat", "path": str(rows)} for name in ("train", "heldout")}
    base = {"job": "fit", "data": data}
    arms = {"plain": {}, "worse": {"offset": 2.0}}
    compared = {"job": "compare", "run": str(folder / "run"), "base": base, "arms": arms}
    return compared | {"seeds": [0, 1], "draws": 20} | fields


def commanded(site: Path, *arguments: str) -> str:
    """What the command line prints where the plugin is installed, for its cells too."""
    done = kdcore(*arguments, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arms_of_a_plugin_s_job_are_run_and_compared(tmp_path: Path, site: Path) -> None:
    fake.install(site, "fit-plugin", source())
    file = tmp_path / "compare.yaml"
    file.write_text(json.dumps(spec_of(tmp_path)))
    outcome = json.loads(commanded(site, "compare", str(file), "--json"))
    assert outcome["failures"] == {}
    rows = {row["arm"]: row for row in outcome["arms"]}
    assert rows["worse"]["seeds"] == [0, 1]
    gap = rows["worse"]["differences"]["teacher_kl"]
    assert (gap["mean"], gap["low"], gap["high"]) == (2.0, 2.0, 2.0)
    figures = [rows[arm]["figures"]["teacher_kl"] for arm in ("plain", "worse")]
    assert figures[1] == figures[0] + 2.0
    cell = (tmp_path / "run/cells/worse/seed-1/spec.yaml").read_text()
    assert "job: fit" in cell and "offset: 2.0" in cell and "responses" not in cell


def registered(site: Path, **given: Any) -> Registry:
    fake.install(site, "fit-plugin", source(**given))
    found = registry_with()
    found.load(fake.entries(site))
    return found


def validated(folder: Path, registry: Registry, **fields: Any) -> Any:
    return validate_spec(spec_of(folder, **fields), folder, registry=registry)


def test_arms_of_a_plugin_s_job_are_checked(tmp_path: Path, site: Path) -> None:
    registry = registered(site)
    spec, job = validated(tmp_path, registry), registry.job("compare")
    report = job.look_ahead(spec, registry=registry)
    assert report == {"plain": {"offset": 0.0}, "worse": {"offset": 2.0}}
    console = Console(file=io.StringIO(), width=80, record=True)
    report_of(job)(console, report, spec)
    said = " ".join(console.export_text().split())
    assert said == "arm plain offset 0.0 arm worse offset 2.0"


def test_a_job_that_is_not_declared_as_comparable_is_refused(tmp_path: Path, site: Path) -> None:
    with pytest.raises(UserError) as wrong:
        validated(tmp_path, registered(site, comparable=False))
    assert wrong.value.cause == "the spec: base.job: job 'fit' cannot be compared"
    assert wrong.value.cure == "choose one that can: distill, train-drafter"


def test_an_unknown_job_is_told_with_the_nearest(tmp_path: Path, site: Path) -> None:
    with pytest.raises(UserError) as wrong:
        validated(tmp_path, registered(site), base={"job": "fitt"})
    assert wrong.value.cause == "the spec: base.job: unknown job 'fitt'"
    assert wrong.value.cure == "did you mean 'fit'?"


def test_mistakes_in_the_spec_of_a_plugin_s_job_stand_where_they_are(
    tmp_path: Path, site: Path
) -> None:
    registry = registered(site)
    with pytest.raises(UserError, match=r"^the spec: base\.ofset: unknown key") as wrong:
        validated(tmp_path, registry, base=spec_of(tmp_path)["base"] | {"ofset": 1})
    assert wrong.value.cure == "did you mean 'offset'?"
    with pytest.raises(UserError, match=r"^the spec: arms\.odd\.offset: must be a number"):
        validated(tmp_path, registry, arms={"odd": {"offset": "much"}})
    with pytest.raises(UserError, match=r"^the spec: base\.data: missing field"):
        validated(tmp_path, registry, base={"job": "fit"})


def test_a_key_of_a_base_at_another_place_is_told_with_its_own(tmp_path: Path, site: Path) -> None:
    base = spec_of(tmp_path)["base"] | {"heldout": "x"}
    with pytest.raises(UserError) as wrong:
        validated(tmp_path, registered(site), base=base)
    assert wrong.value.cure == "'heldout' belongs at base.data.heldout"


def test_a_spec_whose_data_is_not_rows_is_a_fault_of_the_job(tmp_path: Path, site: Path) -> None:
    registry = registered(site, data="dict")
    with pytest.raises(UserError, match=r"job 'fit' is broken: the data of fit_plugin:FitSpec"):
        validated(tmp_path, registry)


def test_a_job_without_a_preflight_is_compared_all_the_same(tmp_path: Path, site: Path) -> None:
    registry = registered(site, preflight=None)
    spec = validated(tmp_path, registry)
    assert registry.job("compare").look_ahead(spec, registry=registry) == {}


def test_the_schema_of_a_comparison_has_the_specs_of_comparable_jobs(site: Path) -> None:
    registry = registered(site)
    schema = json_schema(registry.job("compare").spec, registry)
    assert schema["properties"]["base"]["$ref"] == "#/$defs/job"
    named = [each["$ref"].rpartition("/")[2] for each in schema["$defs"]["job"]["anyOf"]]
    assert named == ["job.distill", "job.train-drafter", "job.fit"]
    assert schema["$defs"]["job.fit"]["properties"]["offset"]["type"] == "number"
    assert "job" not in json_schema(registry.job("distill").spec, registry)["$defs"]


def test_a_comparable_job_needs_a_run_folder_and_the_fields_that_cells_set(site: Path) -> None:
    declared = source().replace("comparable=True", "comparable=True, run_folder=False")
    fake.install(site, "fit-plugin", declared)
    registry = registry_with()
    registry.load(fake.entries(site))
    (problem,) = registry.problems
    assert "job 'fit' is comparable, but has no run folder" in problem.reason


def test_a_comparable_job_s_spec_has_a_seed(site: Path) -> None:
    fake.install(site, "fit-plugin", source().replace("    seed: Seed = 0\n", ""))
    registry = registry_with()
    registry.load(fake.entries(site))
    with pytest.raises(UserError, match="FitSpec lacks the field 'seed'"):
        _ = registry.job("fit").spec
