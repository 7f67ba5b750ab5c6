"""Caches of many shards, of several writers, and in remote folders."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from kdcore.data.best_classes import best_classes
from kdcore.data.caches import shard_folder
from kdcore.data.caches.hidden_states import HiddenStates, Origin, store
from kdcore.data.caches.manifest import Manifest
from kdcore.data.caches.shard_folder import MANIFEST as MANIFEST_FILE
from kdcore.data.caches.shard_folder import ShardFolder
from kdcore.data.caches.teacher_cache import TeacherCache, write_shard
from kdcore.data.store import row_key
from kdcore.errors import UserError
from kdcore.jobs.caches.merge import merge_caches
from kdcore.jobs.caches.writing import being_written
from kdcore.method.records import Row
from kdcore.runs.progress import Silent
from tests.fixtures.object_store import ObjectStore, register
from tests.kdcore.data.caches.shards import shards

V, K = 40, 5
CPU = torch.device("cpu")
MANIFEST = Manifest(1, "teacher", "tokenizer", "template", 1, K, V, "uint16", "float16")


def row(n: int) -> Row:
    tokens = torch.arange(n, n + 3)
    return Row({"input_ids": tokens}, tokens, torch.ones(3, dtype=torch.bool), f"row-{n}")


def logits(n: int) -> torch.Tensor:
    return torch.randn(3, V, generator=torch.Generator().manual_seed(n))


def made(folder: Path, rows: range) -> Path:
    """A cache with a shard of its own for each row."""
    with being_written(folder, MANIFEST):
        for n in rows:
            write_shard(folder, MANIFEST, [(row_key(row(n)), 3)], [best_classes(logits(n), K)], n)
    return folder


def refuse_other_rows(cache: TeacherCache, rows: range) -> None:
    """Each row has the stored classes of its own logits."""
    assert (cache.rows, cache.positions) == (len(rows), 3 * len(rows))
    for n in rows:
        ids, logp, tail = best_classes(logits(n), K)
        found = cache.stored(row_key(row(n)))
        assert found["ids"].tolist() == ids.tolist()
        assert found["logp"].tolist() == logp.numpy().tolist()
        assert found["tail"].tolist() == tail.numpy().tolist()


def maps(folder: Path) -> int:
    """The number of maps of the process that are files of a folder."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_few_of_many_shards_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_folder, "MOST_OPEN", 3)
    cache = TeacherCache(made(tmp_path, range(20)))
    assert maps(tmp_path) == 0
    refuse_other_rows(cache, range(20))
    keys = [row_key(row(n)) for n in (7, 0, 19, 7)]
    assert len(cache.logits(keys, CPU).logits(slice(0, 12))) == 12
    cache.check_shards()
    assert 0 < maps(tmp_path) <= 2 * 3  # a library may map a shard twice


def test_few_of_many_hidden_states_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_folder, "MOST_OPEN", 3)
    monkeypatch.setattr("kdcore.data.caches.hidden_states.SHARD", 1)
    rows = [row(n) for n in range(12)]
    states = {each.id: torch.randn(3, 2) for each in rows}
    origin = Origin("target", (0,), 2, "float32", "float32")
    store(tmp_path, origin, rows, 1, lambda some: (states[r.id] for r in some), Silent())
    assert len(shards(tmp_path)) == 12
    stored = HiddenStates(tmp_path, rows)
    read = stored.read(range(12), 3)
    assert 0 < maps(tmp_path) <= 2 * 3
    assert torch.equal(read, torch.stack([states[each.id] for each in rows]))


def test_hidden_states_are_read_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(n) for n in range(4)]
    states = {each.id: torch.randn(3, 2) for each in rows}
    origin = Origin("target", (0,), 2, "float32", "float32")
    store(tmp_path, origin, rows, 1, lambda some: (states[r.id] for r in some), Silent())
    stored, read = HiddenStates(tmp_path, rows), list[str]()
    opened = ShardFolder.__getitem__

    def noted(files: ShardFolder, number: int) -> object:
        read.append(threading.current_thread().name)
        return opened(files, number)

    monkeypatch.setattr(ShardFolder, "__getitem__", noted)
    batch = {"index": torch.tensor([2, 0]), "input_ids": torch.zeros(2, 5)}
    for _ in range(2):
        stored.request(batch, 0.0)
    found = stored.read([2, 0], 5)
    assert torch.equal(found[:, :3], torch.stack([states["row-2"], states["row-0"]]))
    assert not found[:, 3:].any()
    assert read == ["hidden-states_0"] * 2
    assert not stored._pending


def test_the_hundred_thousandth_shard_follows_the_one_before(tmp_path: Path) -> None:
    """The last of rows with one key counts, and names of six digits sort before 99999."""
    key = row_key(row(0))
    with being_written(tmp_path, MANIFEST):
        for number in (99_999, 100_000):
            write_shard(tmp_path, MANIFEST, [(key, 3)], [best_classes(logits(number), K)], number)
    found = TeacherCache(tmp_path).stored(key)
    assert found["ids"].tolist() == best_classes(logits(100_000), K)[0].tolist()


def test_caches_of_several_writers_are_merged(tmp_path: Path) -> None:
    parts = [made(tmp_path / "a [1]*", range(8)), made(tmp_path / "b", range(5, 14))]
    merged = merge_caches(tmp_path / "merged", parts, shard=9)
    refuse_other_rows(merged, range(14))
    merged.check_shards()
    assert len(shards(tmp_path / "merged")) == 5  # of three rows each
    again = merge_caches(tmp_path / "merged", [*parts, made(tmp_path / "c", range(13, 16))])
    refuse_other_rows(again, range(16))
    assert len(shards(tmp_path / "merged")) == 6


def test_a_merge_that_was_stopped_goes_on(tmp_path: Path) -> None:
    parts = [made(tmp_path / "a", range(6))]
    merge_caches(tmp_path / "merged", parts, shard=1)
    for path in shards(tmp_path / "merged")[3:]:
        path.unlink()
    refuse_other_rows(merge_caches(tmp_path / "merged", parts, shard=1), range(6))


def test_caches_of_different_teachers_are_not_merged(tmp_path: Path) -> None:
    other = Manifest(1, "other", "tokenizer", "template", 1, K, V, "uint16", "float16")
    with being_written(tmp_path / "other", other):
        pass
    mine = made(tmp_path / "mine", range(2))
    with pytest.raises(UserError, match="was built with a different model"):
        merge_caches(tmp_path / "merged", [mine, tmp_path / "other"])
    with pytest.raises(UserError, match="would be merged into itself"):
        merge_caches(mine, [mine])


def test_a_remote_cache_is_read_a_shard_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "kdcore"))
    local, remote = made(tmp_path / "local", range(4)), "memory://bucket/cache"
    fsspec.filesystem("memory").put(str(local), "/bucket/cache", recursive=True)
    cache = TeacherCache(remote)
    assert cache.size == TeacherCache(local).size
    cache.logits([row_key(row(2))], CPU)
    copied = tmp_path / "kdcore/shards"
    assert len(list(copied.glob("*/*.safetensors"))) == 1
    refuse_other_rows(cache, range(4))
    cache.check_shards()
    assert len(list(copied.glob("*/*.safetensors"))) == 4
    refuse_other_rows(TeacherCache(f"file://{local}"), range(4))
    refuse_other_rows(merge_caches(tmp_path / "merged", [remote]), range(4))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder in an object store."""
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "kdcore"))
    monkeypatch.setattr(ObjectStore, "puts", [])
    register()
    yield f"objects://{tmp_path}/bucket/cache"


def test_caches_are_merged_into_an_object_store(tmp_path: Path, bucket: str) -> None:
    parts = [made(tmp_path / "a", range(2)), made(tmp_path / "b", range(2, 4))]
    refuse_other_rows(merge_caches(bucket, parts[:1], shard=1), range(2))
    assert ObjectStore.puts[0] == MANIFEST_FILE
    assert [each[:12] for each in ObjectStore.puts[1:]] == ["shard-00000-", "shard-00001-"]
    refuse_other_rows(merge_caches(bucket, parts, shard=1), range(4))
    refuse_other_rows(TeacherCache(bucket), range(4))
    assert len(ObjectStore.puts) == 5, "what is there is not sent again"
    with pytest.raises(UserError, match="merged into itself"):
        merge_caches(bucket, [bucket])
    other = replace(MANIFEST, teacher="other")
    with pytest.raises(UserError, match="different model"), being_written(bucket, other):
        pass
    with (
        being_written(bucket, MANIFEST),
        pytest.raises(UserError, match="another process is build"),
    ):
        merge_caches(bucket, [made(tmp_path / "c", range(4, 5))])
    other_files = bucket.replace("cache", "other")
    ObjectStore().put_file(str(tmp_path / "a/manifest.json"), f"{other_files}/a.csv")
    with pytest.raises(UserError, match="files that are not a teacher cache"):
        merge_caches(other_files, parts)


def test_what_an_object_store_refuses_is_told(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never taken for a damaged shard, which one would delete."""
    part = made(tmp_path / "a", range(2))
    cache = merge_caches(bucket, [part], shard=1)

    def refuse(*given: Any, **named: Any) -> Any:
        raise PermissionError("403 Forbidden")

    for method, what, work in (
        ("put_file", "written", lambda: merge_caches(bucket, [made(tmp_path / "b", range(2, 3))])),
        ("get_file", "read", lambda: cache.stored(row_key(row(1)))),
        ("cat_ranges", "read", lambda: TeacherCache(bucket)),
        ("ls", "read", lambda: TeacherCache(bucket)),
        ("cat_file", "read", lambda: TeacherCache(bucket)),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError) as told:
            patch.setattr(ObjectStore, method, refuse)
            work()
        assert told.value.cause == f"{bucket} cannot be {what}: 403 Forbidden"
        assert "credentials" in told.value.cure
    refuse_other_rows(cache, range(2))


def test_a_web_server_may_list_no_sizes_and_know_no_ranges(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_caches(bucket, [made(tmp_path / "a", range(3))], shard=1)
    listed = ObjectStore.ls

    def without_sizes(store: ObjectStore, path: str, **named: Any) -> Any:
        return [each | {"size": None} for each in listed(store, path)]

    def whole(store: ObjectStore, path: str, *given: Any, **named: Any) -> bytes:
        return Path(path.removeprefix("objects://")).read_bytes()

    monkeypatch.setattr(ObjectStore, "ls", without_sizes)
    monkeypatch.setattr(ObjectStore, "cat_file", whole)
    refuse_other_rows(TeacherCache(bucket), range(3))
    assert TeacherCache(bucket).size == TeacherCache(tmp_path / "a").size


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_shard_of_an_object_store_that_was_cut_is_named(
    tmp_path: Path, bucket: str, size: int
) -> None:
    merge_caches(bucket, [made(tmp_path / "a", range(2))], shard=1)
    path = shards(tmp_path / "bucket/cache")[1]
    os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        TeacherCache(bucket).check_shards()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing does not contain a teacher cache"),
        ("nosuch://bucket/cache", "nosuch://bucket/cache cannot be opened"),
    ],
)
def test_a_remote_folder_that_is_no_cache_is_refused(location: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        TeacherCache(location)
    assert refused.value.cause.startswith(message)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_shard_that_was_cut_is_named(tmp_path: Path, size: int) -> None:
    made(tmp_path, range(2))
    path = shards(tmp_path)[1]
    os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged"):
        TeacherCache(tmp_path).check_shards()


def test_the_folder_of_no_shards_is_empty(tmp_path: Path) -> None:
    assert ShardFolder(tmp_path, "np").keyed() == []
