"""The commands that merge and read caches of several machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures.processes.forked import kdcore
from tests.kdcore.data.caches.test_shard_folder import made


def test_caches_are_merged_and_read_by_a_url(tmp_path: Path) -> None:
    parts = [made(tmp_path / "a", range(3)), made(tmp_path / "b", range(2, 5))]
    merged = kdcore("cache", "merge", tmp_path / "merged", *parts, "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["rows"] == 5
    read = kdcore("cache", "inspect", f"file://{tmp_path}/merged", "--json")
    assert json.loads(read.stdout) == json.loads(merged.stdout)


@pytest.mark.parametrize("share", ["3/2", "0/2", "half"])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: str) -> None:
    (tmp_path / "spec.yaml").write_text(
        "job: distill\nstudent: {model: s, layers: [0]}\nteacher: {model: t}\n"
        "data: {train: {name: chat, path: rows}}\n"
    )
    said = kdcore("cache", "build", tmp_path / "spec.yaml", "--out", tmp_path, "--share", share)
    assert (said.returncode, f"--share {share} is not a share" in said.stderr) == (2, True)
