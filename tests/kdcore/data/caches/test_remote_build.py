"""`kdcore cache build --out URL`: killed, resumed, inspected, validated, and read in a training."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore_cli.main import run
from tests.fixtures.object_store import ObjectStore, register
from tests.fixtures.processes.forked import python
from tests.kdcore.data.caches.shards import shards
from tests.kdcore.data.caches.test_teacher_cache import (
    asked,
    cached,
    spec_of,
    teacher,
    weights,
    write_rows,
)

__all__ = ["asked", "teacher"]

KILLED = """
import os, signal, sys
from kdcore_cli.main import run
from tests.fixtures.object_store import ObjectStore, register
register()
put = ObjectStore.put_file
def killed(*given, **named):
    if len(ObjectStore.puts) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    put(*given, **named)
ObjectStore.put_file = killed
from kdcore.jobs.caches import build
build.SHARD = 1
run(sys.argv[1:])
"""


def test_a_build_that_was_killed_goes_on_in_the_object_store(
    tmp_path: Path,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kdcore.jobs.caches.build.SHARD", 1)
    monkeypatch.setattr(ObjectStore, "puts", [])
    register()
    (tmp_path / "spec.yaml").write_text(json.dumps(asked))  # JSON is YAML
    url, there = f"objects://{tmp_path}/bucket/cache", tmp_path / "bucket/cache"
    build = ["cache", "build", str(tmp_path / "spec.yaml"), "--out", url, "--k", "6", "--json"]
    assert python("-c", KILLED, *build).returncode == -signal.SIGKILL
    begun = [path.name for path in shards(there)]
    assert len(begun) == 2
    assert run(["cache", "validate", url, str(tmp_path / "spec.yaml")]) == 2
    assert "lacks 7 of 9 rows" in capsys.readouterr().err

    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "another machine"))
    assert run(build) == 0
    built = json.loads(capsys.readouterr().out)
    assert not {"manifest.json", *begun} & {*ObjectStore.puts}, "they are not sent again"
    whole = build_cache(spec_of(asked), tmp_path / "whole", k=6)
    for one, other in zip(shards(tmp_path / "whole"), shards(there), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert run(["cache", "inspect", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == built
    assert built["rows"] == whole.rows and built["bytes"] == whole.size
    assert run(["cache", "validate", url, str(tmp_path / "spec.yaml")]) == 0

    more = write_rows(Path(asked["data"]["train"]["path"]), range(11))
    assert run([*build[:-1], "--quiet"]) == 0
    told = capsys.readouterr()
    assert f"--set data.teacher_cache={url}" in " ".join(told.out.split())
    assert len(shards(there)) == 11 and more.exists()

    data = asked["data"] | {"teacher_cache": url}
    far = distill(spec_of(asked, run=str(tmp_path / "far"), data=data))
    build_cache(spec_of(asked), tmp_path / "whole", k=6)
    near = distill(cached(asked, tmp_path / "whole"))
    assert all(torch.equal(each, weights(near)[name]) for name, each in weights(far).items())
