"""Several machines write a cache to one URL: one after the other, and at the same time.

A machine is a ``KDCORE_CACHE``, where the lock of a URL is. What a machine does while another one
writes is done between two shards of the other, so that nothing depends on time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcore.data.caches.manifest import Manifest
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.errors import UserError
from kdcore.jobs.caches import build
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.caches.merge import merge_caches
from tests.fixtures.object_store import ObjectStore, register
from tests.kdcore.data.caches.shards import shards
from tests.kdcore.data.caches.test_teacher_cache import ROWS, asked, spec_of, teacher

__all__ = ["asked", "teacher"]

Put = Callable[..., None]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a cache whose shards have a row each."""
    monkeypatch.setattr(build, "SHARD", 1)
    monkeypatch.setattr(ObjectStore, "puts", [])
    register()
    return f"objects://{tmp_path}/bucket/cache"


def on_machine(place: Path, work: Callable[[], Any]) -> None:
    """Do something on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCORE_CACHE", str(place))
        work()


def meanwhile(monkeypatch: pytest.MonkeyPatch, shard: int, work: Callable[[], None]) -> None:
    """Do something once, before the n-th shard is written."""
    write, begun = build.write_shard, list[int]()

    def written(*given: Any) -> None:
        begun.append(1)
        if len(begun) == shard:
            work()
        write(*given)

    monkeypatch.setattr(build, "write_shard", written)


def refuse_other_contents(url: str, alone: Path) -> None:
    """The cache has the rows of the one that a machine built alone, to the bit."""
    found, whole = TeacherCache(url), TeacherCache(alone)
    found.check_shards()
    assert (found.rows, found.positions) == (whole.rows, whole.positions) and found.rows == ROWS
    for arrays in whole.arrays_by_shard():
        for key in arrays["keys"]:
            for name, value in whole.stored(key.tobytes()).items():
                assert (found.stored(key.tobytes())[name] == value).all()


@pytest.mark.parametrize("shares", [[(1, 2), (2, 2)], [(1, 1), (1, 1)]], ids=["shares", "all rows"])
@pytest.mark.parametrize("shard", [1, 3])
def test_two_machines_write_one_url_at_once(
    tmp_path: Path,
    asked: dict[str, Any],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[int, int]],
    shard: int,
) -> None:
    spec, (mine, other) = spec_of(asked), shares
    alone = build_cache(spec, tmp_path / "alone", k=6)
    ObjectStore.puts.clear()

    def elsewhere() -> None:
        on_machine(tmp_path / "other", lambda: build_cache(spec, url, k=6, share=other))

    meanwhile(monkeypatch, shard, elsewhere)
    assert build_cache(spec, url, k=6, share=mine).rows == ROWS
    refuse_other_contents(url, Path(str(alone.folder)))
    if mine != other:
        assert len(ObjectStore.puts) == 1 + ROWS, "no shard is sent twice"


def test_two_machines_write_one_url_one_after_the_other(
    tmp_path: Path, asked: dict[str, Any], url: str
) -> None:
    spec = spec_of(asked)
    build_cache(spec, tmp_path / "alone", k=6)
    ObjectStore.puts.clear()
    for number in (2, 1):
        place = tmp_path / f"machine {number}"
        on_machine(place, lambda n=number: build_cache(spec, url, k=6, share=(n, 2)))  # type: ignore[misc]
    refuse_other_contents(url, tmp_path / "alone")
    assert len(ObjectStore.puts) == 1 + ROWS
    build_cache(spec, url, k=6)
    assert len(ObjectStore.puts) == 1 + ROWS, "a build without a share finds all rows"


def test_a_merge_and_a_build_write_one_url_at_once(
    tmp_path: Path, asked: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(asked)
    build_cache(spec, tmp_path / "alone", k=6)
    build_cache(spec, tmp_path / "part", k=6, share=(2, 2))

    def elsewhere() -> None:
        on_machine(tmp_path / "other", lambda: merge_caches(url, [tmp_path / "part"], shard=1))

    meanwhile(monkeypatch, 2, elsewhere)
    build_cache(spec, url, k=6, share=(1, 2))
    refuse_other_contents(url, tmp_path / "alone")


def test_of_two_that_create_a_cache_the_earlier_is_refused(
    tmp_path: Path, asked: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no manifest, and the one with another k wrote its own last."""
    computed = build._local

    def slowly(*given: Any) -> Any:
        score = computed(*given)

        def best_of(rows: Any) -> Any:
            there = tmp_path / "bucket/cache/manifest.json"
            found = Manifest(**json.loads(there.read_text()))
            there.write_text(json.dumps({n: getattr(found, n) for n in found.__slots__} | {"k": 4}))
            yield from score(rows)

        return best_of

    monkeypatch.setattr(build, "_local", slowly)
    with pytest.raises(UserError, match=r"bucket/cache was built with a different width k"):
        build_cache(spec_of(asked), url, k=6)
    assert not shards(tmp_path / "bucket/cache")
