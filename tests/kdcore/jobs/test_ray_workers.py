"""Shares on a Ray cluster: one of two workers is killed, and the outcome is that of one machine."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore import library
from kdcore.errors import UserError
from kdcore.jobs import ray_workers
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.comparison.compare import compare
from kdcore.jobs.generate_data import generate_data
from kdcore.jobs.ray_workers import spread
from kdcore.runs.progress import Silent
from kdcore.specs.distill import DistillSpec
from kdcore.specs.generate_data import GenerateDataSpec
from tests.fixtures.object_store import register
from tests.fixtures.processes.dying import (
    DyingInMidRun,
    DyingOnce,
    DyingWithItsNode,
    deadly,
    doubled,
)
from tests.kdcore.data.caches.shards import shards
from tests.kdcore.jobs.comparison.comparisons import asked, compare_spec
from tests.kdcore.jobs.comparison.conftest import base

__all__ = ["base"]

Work = Callable[[Any], Any]

HEALTH = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 5000, "failure_threshold": 3}
"""When Ray takes a node for dead."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nodes of one CPU each, the second one in a folder of its own. The id of the first."""
    ray: Any = import_module("ray")
    soon = {f"health_check_{name}": value for name, value in HEALTH.items()}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # else the other tests leave them no time
        nodes = import_module("ray.cluster_utils").Cluster(True, head_node_args=head)
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        with patch.context() as elsewhere:
            elsewhere.chdir(tmp_path_factory.mktemp("node"))
            nodes.add_node(num_cpus=1)
        yield nodes.head_node.node_id
        ray.shutdown()
        nodes.shutdown()


def dying(work: Work, folder: Path) -> DyingOnce:
    folder.mkdir()
    return DyingOnce(f"{work.__module__}:{work.__name__}", str(folder))


def processes(folder: Path) -> int:
    return len([*folder.glob("process-*")])


@pytest.mark.needs("Ray")
def test_the_share_of_a_worker_that_dies_is_done_again(cluster: str, tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    dead = dying(doubled, tmp_path / "a")
    found = dict(spread(dead, range(6), died=lambda *given: told.append(given)))
    assert [line for _, line in told] == [
        "warning: its worker died, and another one does its work again"
    ]
    refused = found.pop(3)
    assert isinstance(refused, UserError) and refused.cause == "3 is refused"
    assert found == {place: 2 * place for place in range(6) if place != 3}
    assert processes(tmp_path / "a") == 3, "two workers, and one in place of the killed one"


@pytest.mark.needs("Ray")
def test_a_share_that_always_kills_its_worker_does_not_stop_the_others(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "REPEATS", 1)
    found = dict(spread(deadly, [0, 1, 2]))
    died = found.pop(1)
    assert isinstance(died, UserError) and "its worker died 2 times" in died.cause
    assert found == {0: 0, 2: 2}


def test_what_ray_prints_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says on stdout why a worker died, whatever `init` is told."""
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: None, shutdown=print)
    monkeypatch.setattr(ray_workers, "_installed_ray", lambda: ray)
    with ray_workers.connected("ray"):
        print("(raylet) A worker died")
    shown = capsys.readouterr()
    assert (shown.out.strip(), shown.err.strip()) == ("", "(raylet) A worker died")


def test_a_module_that_workers_lack_is_named() -> None:
    said = "The actor died in its creation task: ModuleNotFoundError: No module named 'my_gate'"
    lacking = ray_workers._died(RuntimeError(said))
    assert lacking.cause == "a machine of the cluster lacks the Python module my_gate"


def test_a_worker_refuses_a_machine_that_computes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ray_workers._versions()
    assert {"python", "kdcore", "torch"} <= own.keys()
    needs = ray_workers._Needs(str(tmp_path), own, (str(tmp_path / "spec.yaml"), b"job: compare"))

    def told(**other: Any) -> str:
        found = ray_workers._Worker(doubled, replace(needs, **other)).carry_out(1)
        return found.cause if isinstance(found, ray_workers.UnfitMachine) else str(found)

    assert f"does not see the folder {tmp_path} of the calling one" in told()
    (tmp_path / "spec.yaml").write_text("job: compare")
    assert told() == "2"
    assert "lacks the folder /nowhere" in told(folder="/nowhere")
    assert f"has kdcore {own['kdcore']}, and the calling one has 99" in told(
        versions=own | {"kdcore": "99"}
    )
    assert "lacks far-plugin" in told(versions=own | {"far-plugin": "1"})


@pytest.mark.needs("Ray")
def test_a_machine_that_would_fail_each_share_stops_the_work(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would take one share after the other, and fail all of a comparison's cells."""
    versions = ray_workers._versions() | {"far-plugin": "1"}
    monkeypatch.setattr(ray_workers, "_versions", lambda: versions)
    with pytest.raises(ray_workers.UnfitMachine, match="lacks far-plugin"):
        [*spread(doubled, [0])]


def answering(base: dict[str, Any], run: Path) -> GenerateDataSpec:
    how = {"max_new_tokens": 4, "batch_size": 3, "temperature": 1.0}
    asked = {"teacher": base["teacher"], "source": base["data"]["train"], "responses": how}
    return GenerateDataSpec.model_validate({"job": "generate-data", "run": str(run), **asked})


@pytest.mark.needs("Ray")
def test_a_worker_that_is_killed_in_mid_run_leaves_the_files_of_one_machine(
    cluster: str, tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches are spread by the same function, and this process writes their shards."""
    (tmp_path / "workers").mkdir()

    def killing(work: Work, shares: Sequence[Any], **how: Any) -> Iterator[tuple[int, Any]]:
        yield from spread(DyingInMidRun(work, str(tmp_path / "workers"), 1), shares, **how)

    monkeypatch.setattr("kdcore.jobs.generate_data.spread", killing)
    there, here = tmp_path / "there", tmp_path / "here"
    for run, on in ((there, "ray"), (here, None)):
        generate_data(answering(base, run), on=on)  # type: ignore[arg-type]
    assert (tmp_path / "workers/killed").exists()
    assert processes(tmp_path / "workers") == 3, "two workers, and one in place of the killed one"
    for name in ("responses.jsonl", "responses.manifest.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.needs("Ray")
def test_cells_on_ray_give_what_they_give_here(
    cluster: str, tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two nodes dies in the middle of its cell, which goes on elsewhere."""
    arms: dict[str, Any] = {"kd": {}, "speckd": {"method": {"gates": ["speckd"]}}}
    base = base | {"training": base["training"] | {"save_every": 1}}

    def outcome(name: str, **where: Any) -> tuple[Any, list[bytes]]:
        (tmp_path / name).mkdir()
        spec = compare_spec(asked(tmp_path / name, base, arms=arms, seeds=[0], draws=10))
        run = compare(spec, **where)
        weights = sorted(run.folder.glob("cells/*/*/model/model.safetensors"))
        found = run.read_json("comparison.json")
        for arm in found["arms"]:
            assert arm.pop("cost")["peak_memory"] > 0
        return found, [path.read_bytes() for path in weights]

    (tmp_path / "workers").mkdir()
    work = DyingWithItsNode(str(tmp_path / "workers"), cluster)
    monkeypatch.setattr("kdcore.jobs.comparison.cell_process.told_by_cell", work)
    there = outcome("there", on="ray")
    assert processes(tmp_path / "workers") == 3 and (tmp_path / "workers/killed").exists()
    assert there == outcome("here") and len(there[1]) == 2


def on_other_machines(
    work: Work, shares: Sequence[Any], *, fresh: bool = False, died: Any = None
) -> Iterator[tuple[int, Any]]:
    """The shares from the last to the first, each with a worker of its own; one dies at first."""
    for place, share in reversed([*enumerate(shares)]):
        sent, given = copy.deepcopy((work, share))
        if place == 0 and died:
            died(place, "its worker died")
        yield place, sent(given)


class Notes(Silent):
    """What a job says besides its progress."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, line: str) -> None:
        self.found.append(line)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("kdcore.jobs.generate_data", "kdcore.jobs.caches.build"):
        monkeypatch.setattr(f"{job}.connected", nullcontext)
        monkeypatch.setattr(f"{job}.spread", on_other_machines)


def test_answers_of_workers_are_those_of_this_process(
    elsewhere: None, tmp_path: Path, base: dict[str, Any]
) -> None:
    runs = [
        generate_data(answering(base, tmp_path / name), on=on)
        for name, on in (("there", "ray"), ("here", None))
    ]
    for file in ("responses.jsonl", "responses.manifest.json"):
        one, other = (run.path(file).read_bytes() for run in runs)
        assert one == other
    one, other = (run.read_json("run.json")["responses"] for run in runs)
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_shards_of_workers_are_those_of_this_process(
    elsewhere: None, tmp_path: Path, base: dict[str, Any]
) -> None:
    spec = DistillSpec.model_validate(base | {"run": str(tmp_path / "run")})
    there, here = tmp_path / "bucket/there", tmp_path / "here"
    register()
    notes = Notes()
    build_cache(spec, f"objects://{there}", k=4, shard=20, on="ray", progress=notes)
    build_cache(spec, here, k=4, shard=20)
    assert notes.found == [f"shard 1 of {len(shards(here))}: its worker died"]
    whole, sent = shards(here), shards(there)
    assert len(whole) > 1
    assert [each.read_bytes() for each in sent] == [each.read_bytes() for each in whole]
    assert (there / "manifest.json").read_bytes() == (here / "manifest.json").read_bytes()


def test_a_machine_with_other_rows_is_refused(
    elsewhere: None, tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(base["data"]["train"]["path"]).read_text())
    data = base["data"] | {"train": {"name": "chat", "path": str(rows)}}
    spec = DistillSpec.model_validate(base | {"run": str(tmp_path / "run"), "data": data})

    def changed(*given: Any, **named: Any) -> Iterator[tuple[int, Any]]:
        rows.write_text(json.dumps({"prompt": "the mat?", "response": "sat"}) + "\n")
        yield from on_other_machines(*given, **named)

    monkeypatch.setattr("kdcore.jobs.caches.build.spread", changed)
    with pytest.raises(UserError, match=r"the rows of data\.train differ on the machine"):
        build_cache(spec, tmp_path / "cache", k=4, on="ray")


def test_without_ray_nothing_is_begun(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="requires the package ray, which is not"):
        library.run(answering(base, tmp_path / "run"), on="ray")
    assert not (tmp_path / "run").exists()


def test_other_jobs_are_not_spread(tmp_path: Path, base: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"distill cannot be spread.*\n.*compare, generate-data"):
        library.run({"job": "distill", **base, "run": str(tmp_path / "run")}, on="ray")


@pytest.mark.parametrize(
    ("resources", "workers", "options"),
    [
        ({"GPU": 4.0, "CPU": 64.0}, 4, {"num_gpus": 1}),
        ({"CPU": 7.0}, 3, {"num_cpus": 2, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}}),
    ],
)
def test_a_worker_has_a_gpu_or_the_threads_of_this_process(
    resources: dict[str, float],
    workers: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ray_workers._room(resources) == (workers, options)
    with pytest.raises(UserError, match="the cluster has 1 CPUs, and a worker needs 2"):
        ray_workers._room({"CPU": 1.0})
