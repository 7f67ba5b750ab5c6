"""What a teacher cache holds, how exact it is, what it costs, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import get_worker_info

from kdcore.components.registry import installed
from kdcore.data.batching.faults import raise_fault
from kdcore.data.batching.stored import STORED, ReadingCollation
from kdcore.data.caches.manifest import Manifest
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.data.store import RowKeys, row_key
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache, least_of_shard, validate_cache
from kdcore.jobs.distill import distill
from kdcore.method.records import Row
from kdcore.models.assembly import Assembly
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.training.method import build_objective
from kdcore.training.teachers.kinds import CachedClasses
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import python
from tests.kdcore.data.caches.shards import shards
from tests.tiny.distill_specs import chat
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer

V = 290
ROWS = 9


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


def write_rows(path: Path, numbers: range) -> Path:
    rows = [chat(n) for n in numbers]
    write_lines(path, rows)
    return path


@pytest.fixture
def asked(tmp_path: Path, teacher: Path) -> dict[str, Any]:
    return {
        "job": "distill",
        "run": str(tmp_path / "run"),
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": {
            "train": {"name": "chat", "path": str(write_rows(tmp_path / "rows", range(ROWS)))}
        },
        "method": {"gates": ["speckd"]},
        "training": {
            "batch_size": 4,
            "optimizer": "sgd",
            "momentum": 0,
            "learning_rate": 0.1,
            "steps": 5,
        },
        "evaluation": {"samples": 0},
    }


def spec_of(asked: dict[str, Any], **changes: Any) -> DistillSpec:
    return DistillSpec.model_validate(asked | changes)


def metrics(run: Run) -> list[dict[str, float]]:
    lines = run.path("metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def weights(run: Run) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run.path("model/model.safetensors"))


def cached(asked: dict[str, Any], folder: Path, **changes: Any) -> DistillSpec:
    data = asked["data"] | {"teacher_cache": str(folder)}
    return spec_of(asked, run=str(folder) + "-run", data=data, **changes)


def test_a_run_on_a_cache_of_all_classes_is_the_live_run(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    live = distill(spec_of(asked))
    cache = build_cache(spec_of(asked), tmp_path / "cache", k=V)
    assert (cache.rows, cache.manifest.k) == (ROWS, V)
    again = distill(cached(asked, tmp_path / "cache"))
    for one, other in zip(metrics(live), metrics(again), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["acceptance/speckd"] == other["acceptance/speckd"]
    for name, weight in weights(live).items():
        torch.testing.assert_close(weights(again)[name], weight, rtol=0, atol=1e-3)
    assert any((w != weights(live)[n]).any() for n, w in weights(again).items())  # it was read


def test_workers_read_the_cache(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(spec_of(asked), tmp_path / "cache", k=6)
    alone = weights(distill(cached(asked, tmp_path / "cache")))
    stored = TeacherCache.stored

    def by_workers(cache: TeacherCache, key: bytes) -> Any:
        assert get_worker_info() is not None, "the training process reads the cache"
        return stored(cache, key)

    monkeypatch.setattr(TeacherCache, "stored", by_workers)
    more = {"trainer": {"dataloader_num_workers": 2}, "accumulation": 2, "batch_size": 2}
    several = cached(asked, tmp_path / "cache", training=asked["training"] | more)
    several = several.model_copy(update={"run": tmp_path / "several"})
    again = weights(distill(several))
    for name, weight in alone.items():  # the same rows in smaller batches
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6)


def first_row(items: Any) -> dict[str, Any]:
    return {"index": torch.tensor([0])}


def test_a_worker_tells_of_a_damaged_shard(tmp_path: Path, asked: dict[str, Any]) -> None:
    found = build_cache(spec_of(asked), tmp_path / "cache", k=6)
    read = CachedClasses(found, RowKeys(found.keys_by_shard()))
    collation = ReadingCollation(first_row, read)
    spawned = ForkingPickler.loads(ForkingPickler.dumps(collation))
    assert spawned([])[STORED]["ids"].shape[1] == 6
    (path,) = shards(tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"shard-00000.safetensors is damaged"):
        raise_fault(collation([]))


def test_a_narrow_cache_gives_the_gate_what_the_teacher_does(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    still = {"training": asked["training"] | {"learning_rate": 1e-9}}
    live = distill(spec_of(asked, **still))
    build_cache(spec_of(asked), tmp_path / "cache", k=6)
    again = distill(cached(asked, tmp_path / "cache", **still))
    rates = [[line["acceptance/speckd"] for line in metrics(run)] for run in (live, again)]
    assert rates[0] == rates[1]


def test_a_killed_build_goes_on_at_the_next_shard(tmp_path: Path, asked: dict[str, Any]) -> None:
    whole = build_cache(spec_of(asked), tmp_path / "whole", k=4, shard=1)
    script = """
import json, os, signal, sys
from pathlib import Path
from kdcore.jobs.caches import build as build_cache
from tests.kdcore.data.caches.shards import shards
from kdcore.specs.distill import DistillSpec
folder, write = Path(sys.argv[2]), build_cache.write_shard
def killed(*given):
    if len(shards(folder)) == 2:
        (folder / "shard-00002.safetensors.kdcore-part").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(*given)
build_cache.write_shard = killed
spec = DistillSpec.model_validate(json.loads(sys.argv[1]))
build_cache.build_cache(spec, folder, k=4, shard=1)
"""
    broken = tmp_path / "broken"
    assert python("-c", script, json.dumps(asked), broken).returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in shards(broken)}
    assert len(kept) == 2
    with pytest.raises(UserError, match="lacks 7 of 9 rows"):
        distill(cached(asked, broken, method={}))
    build_cache(spec_of(asked), broken, k=4, shard=1)
    assert {n: (broken / n).stat().st_mtime_ns for n in kept} == kept
    assert not list(broken.glob("*.kdcore-part"))
    assert len(shards(broken)) == len(shards(whole.folder)) == ROWS
    for one, other in zip(shards(whole.folder), shards(broken), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_shard_ends_at_a_size_in_bytes(tmp_path: Path, asked: dict[str, Any]) -> None:
    manifest = build_cache(spec_of(asked), tmp_path / "cache", k=4).manifest
    assert manifest.bytes_per_position == 4 * (2 + 2)  # uint16 ids and float16
    wide = replace(manifest, k=4096, ids="int32")
    assert least_of_shard(1, manifest) == 16_384
    assert least_of_shard(10**9, manifest) == 100_000
    assert least_of_shard(10**9, wide) == 2**28 // (4096 * 6)


def test_a_cache_that_another_process_builds_is_left_alone(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with (
        FileLock(cache / "lock"),
        pytest.raises(UserError, match=f"another process is building {cache}"),
    ):
        build_cache(spec_of(asked), cache, k=4)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_rows_are_found_in_any_order_and_a_longer_data_set_adds_its_own(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    folder = tmp_path / "cache"
    build_cache(spec_of(asked), folder, k=4)
    write_rows(tmp_path / "rows", range(ROWS + 2, -1, -1))
    with pytest.raises(UserError, match="lacks 3 of 12 rows"):
        validate_cache(folder, spec_of(asked, method={}))
    build_cache(spec_of(asked), folder, k=4)
    cache = validate_cache(folder, spec_of(asked, method={}))
    assert (cache.rows, len(shards(folder))) == (12, 2)


def test_a_row_is_what_is_in_it() -> None:
    row = Row(
        {"input_ids": torch.tensor([1, 2])}, torch.tensor([2, 3]), torch.tensor([True, False]), "a"
    )
    assert row_key(row) == row_key(replace(row, id="b"))
    assert row_key(row) != row_key(replace(row, mask=torch.tensor([True, True])))
    assert row_key(row) != row_key(replace(row, inputs={"input_ids": torch.tensor([1, 3])}))


def test_what_was_made_from_something_else_is_refused(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    build_cache(spec_of(asked), folder, k=8)
    other = saved(tiny_model(seed=1), tmp_path / "other")
    with pytest.raises(UserError, match=r"built with a different model\n"):
        distill(cached(asked, folder, teacher={"model": str(other)}, student={"layers": [0]}))
    base = tiny_model()
    base.tokenizer.chat_template += " "
    saved(base, tmp_path / "template")
    template = {"model": str(tmp_path / "template")}
    with pytest.raises(UserError, match=r"built with a different chat template\n"):
        distill(cached(asked, folder, teacher=template), overwrite=True)
    with pytest.raises(UserError, match=r"built with a different width k\n"):
        build_cache(spec_of(asked), folder, k=9)

    manifest = TeacherCache(folder).manifest
    loaded = replace(base, digest=manifest.teacher, tokenizer=tiny_tokenizer())
    TeacherCache(folder).refuse_other_origin(loaded, V)
    with pytest.raises(UserError, match="built with a different number of classes"):
        TeacherCache(folder).refuse_other_origin(loaded, V - 1)
    monkeypatch.setattr("kdcore.data.caches.manifest.MASK_RULE", -1)
    with pytest.raises(UserError, match=r"built with a different mask rule\n"):
        TeacherCache(folder).refuse_other_origin(loaded, V)
    monkeypatch.undo()
    loaded.tokenizer.add_tokens(["one more"])
    with pytest.raises(UserError, match=r"built with a different tokenizer\n"):
        TeacherCache(folder).refuse_other_origin(loaded, V)

    with pytest.raises(UserError, match="does not contain a teacher cache"):
        TeacherCache(tmp_path)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    older = "has cache format 2, but this version of kdcore reads format 1"
    with pytest.raises(UserError, match=older):
        TeacherCache(folder)
    (folder / "manifest.json").write_text(text)
    (shard,) = shards(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        TeacherCache(folder)


def test_the_dtype_in_which_the_teacher_ran_is_its_own(
    tmp_path: Path, asked: dict[str, Any], teacher: Path
) -> None:
    folder = tmp_path / "cache"
    build_cache(spec_of(asked), folder, k=4)
    assert TeacherCache(folder).manifest.computed == "float32"
    rounded = spec_of(asked, teacher={"model": str(teacher), "dtype": "bfloat16"}, method={})
    with pytest.raises(UserError, match=r"built with a different dtype of the model\n"):
        build_cache(rounded, folder, k=4)
    with pytest.raises(UserError, match=r"built with a different dtype of the model\n"):
        validate_cache(folder, rounded)


def test_a_cache_that_does_not_say_it_is_read_and_is_the_same_to_a_run(
    tmp_path: Path, asked: dict[str, Any], teacher: Path
) -> None:
    folder = tmp_path / "cache"
    build_cache(spec_of(asked), folder, k=4)
    file = folder / "manifest.json"
    said = json.loads(file.read_text())
    del said["computed"], said["date"]
    file.write_text(json.dumps(said))
    cache = TeacherCache(folder)
    assert cache.manifest.digest == hashlib.sha256(json.dumps(said).encode()).hexdigest()
    for dtype in ("float32", "bfloat16"):
        teachers = {"model": str(teacher), "dtype": dtype}
        validate_cache(folder, spec_of(asked, teacher=teachers, method={}))


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        ("all", None),
        ("random", None),
        ({"name": "uniform", "weight": 0.5}, None),
        ("confidence", None),
        ("student_entropy", None),
        ({"name": "speckd", "k": 8}, None),
        ({"name": "inverted", "gate": {"name": "speckd", "k": 8}}, None),
        ({"name": "speckd", "k": 9}, "needs the top 9 classes"),
        ({"name": "speckd", "verification": "sampling"}, "needs all 290 classes"),
        ({"name": "speckd", "verification": "expected"}, "needs all 290 classes"),
        ({"name": "inverted", "gate": "hellinger"}, "needs all 290 classes"),
        ("entropy", "needs all 290 classes"),
        ("hellinger", "needs all 290 classes"),
        ({"name": "adaspec", "reference": "a model"}, "needs all 290 classes"),
    ],
    ids=str,
)
def test_a_gate_that_needs_more_than_there_is_is_refused(
    tmp_path: Path, gate: Any, refused: str | None
) -> None:
    given = gate if isinstance(gate, dict) else {"name": gate}
    if given["name"] == "random":
        given = given | {"rate": 0.5}
    if given["name"] == "confidence":
        given = given | {"threshold": 0.5}
    objective = build_objective(
        MethodSpec.model_validate({"gates": [given]}), Assembly(installed())
    )
    for k, reason in ((8, refused), (V, None)):
        manifest = Manifest(1, "", "", "", 1, k, V, "uint16", "float16")
        (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
        cache = TeacherCache(tmp_path)
        if reason is None:
            cache.refuse_method(objective)
        else:
            with pytest.raises(UserError, match=reason):
                cache.refuse_method(objective)


def test_the_commands(tmp_path: Path, asked: dict[str, Any], capsys: Any) -> None:
    from kdcore.specs.reading import plain_yaml
    from kdcore_cli.main import run

    file, folder = tmp_path / "spec.yaml", str(tmp_path / "cache")
    file.write_text(plain_yaml.dump(asked))
    assert run(["cache", "build", str(file)]) == 2
    assert "data.teacher_cache" in capsys.readouterr().err
    nameless = ["--endpoint", "http://localhost:1/v1", "--model", ""]
    assert run(["cache", "build", str(file), "--out", folder, *nameless]) == 2
    assert "--model: must have at least 1 character, not 0" in capsys.readouterr().err
    assert run(["cache", "build", str(file), "--out", folder, "--k", "6", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["cache", "inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["k"], facts["rows"], facts["ids"]) == (6, ROWS, "uint16")
    assert run(["cache", "validate", folder, str(file), "--quiet"]) == 0
    base = {key: value for key, value in asked.items() if key not in ("job", "run")}
    base["data"] = base["data"] | {"heldout": base["data"]["train"]}
    comparison = tmp_path / "compare.yaml"
    comparison.write_text(plain_yaml.dump({"job": "compare", "base": base, "arms": {"kd": {}}}))
    capsys.readouterr()
    assert run(["cache", "build", str(comparison), "--out", folder, "--k", "6"]) == 0
    assert "--set base.data.teacher_cache=" in capsys.readouterr().out
    assert run(["cache", "validate", folder, str(comparison)]) == 2
    assert "cells/ARM/seed-N/spec.yaml" in capsys.readouterr().err
    greedy = ["--set", "method.gates.0.k=7"]
    assert run(["cache", "build", str(file), "--out", folder, "--k", "6", *greedy]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "needs the top 7 classes of the teacher, but" in told and "set --k, or choose" in told
    assert run(["cache", "validate", folder, str(file), "--quiet", *greedy]) == 2
    assert "needs the top 7 classes" in capsys.readouterr().err
    use = ["--set", f"data.teacher_cache={folder}"]
    assert run(["check", str(file), *use]) == 0
    assert run(["check", str(file), *use, "--set", "method.gates.0.verification=sampling"]) == 2


def test_a_teacher_whose_logits_are_not_finite_makes_no_cache(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    model = tiny_model()
    model.model.model.norm.weight.data.fill_(float("nan"))
    spec = spec_of(asked, teacher={"model": str(saved(model, tmp_path / "nan"))})
    with pytest.raises(UserError, match=r"the logits of .* contain NaN or infinite values"):
        build_cache(spec, tmp_path / "cache", k=4)
    assert not shards(tmp_path / "cache")
