"""``kdcore cache local`` shows what is in KDCORE_CACHE, and removes what no process uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.data.encoded.encode import encoded_rows
from kdcore.data.store import row_key
from kdcore.models.folder.files import file_digest
from kdcore.models.folder.kept_files import held_folder, made_once
from kdcore.runs.progress import Silent
from tests.cli.conftest import Kdcore
from tests.fixtures.object_store import register
from tests.fixtures.processes.forked import python
from tests.kdcore.data.caches.test_shard_folder import made, refuse_other_rows
from tests.kdcore.data.caches.test_shard_folder import row as cached_row
from tests.kdcore.data.encoded.test_encoded_rows import Encodes, row
from tests.tiny.tiny_chat_models import tiny_tokenizer

MAKES_GRAPHS = """
import sys
from pathlib import Path
from kdcore.models.folder.kept_files import made_once
for name in ("file", "folder"):
    write = (lambda place: place.mkdir()) if name == "folder" else (lambda place: place.touch())
    made_once(Path(sys.argv[1], name), write)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "kept of others"))
    return tmp_path / "kept of others"


def test_what_is_kept_is_shown_and_cleared(kdcore: Kdcore, tmp_path: Path, cache: Path) -> None:
    assert "0 entries" in kdcore("cache", "local").out
    assert "removed 0 entries" in kdcore("cache", "local", "rows", "--clear").out
    mine = cache / "mine/file"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for name in ("..", "rows/..", "/tmp", "", "mine"):
        said = kdcore("cache", "local", name)
        assert said.code == 2 and "kdcore does not keep a folder" in said.err
    tokenizer = tiny_tokenizer()
    used, _ = encoded_rows(Encodes([row(0, 9)], "used"), tokenizer, 20, Silent())
    encoded_rows(Encodes([row(0, 9)], "old"), tokenizer, 20, Silent())
    register()
    local, url = made(tmp_path / "local", range(2)), f"objects://{tmp_path}/bucket/my cache"
    shutil.copytree(local, tmp_path / "bucket/my cache")
    remote = TeacherCache(url)
    remote.stored(row_key(cached_row(0)))
    assert file_digest(tmp_path / "local/manifest.json")
    assert python("-c", MAKES_GRAPHS, cache / "openvino").returncode == 0

    shown = kdcore("cache", "local").out
    assert [each for each in ("openvino", "rows", "sha256", "shards") if each in shown.split()]
    listed = json.loads(kdcore("cache", "local", "--json").out)
    assert {each["folder"]: each["bytes"] for each in listed}.keys() == {
        "openvino", "rows", "sha256", "shards",
    }  # fmt: skip
    (copies,) = (each for each in listed if each["folder"] == "shards")
    assert copies["name"].startswith("my-cache-")
    assert copies["bytes"] == next((tmp_path / "local").glob("shard-*")).stat().st_size
    assert copies["name"] in "".join(kdcore("cache", "local", "shards").out.split())

    assert "removed 1 entry" in (said_of := kdcore("cache", "local", "rows", "--clear").out)
    assert "; 1 in use" in said_of
    assert "removed 3 entries" in kdcore("cache", "local", "--clear").out
    left = json.loads(kdcore("cache", "local", "--json").out)
    assert sorted(each["folder"] for each in left) == ["rows", "shards"]
    refuse_other_rows(remote, range(2))
    assert len(used) == 1
    del remote, used
    assert "removed 2 entries" in kdcore("cache", "local", "--clear").out
    assert "0 entries" in kdcore("cache", "local").out and mine.exists()
    refuse_other_rows(TeacherCache(url), range(2))
    assert file_digest(tmp_path / "local/manifest.json")


def test_what_this_process_made_or_reads_is_not_removed(kdcore: Kdcore, cache: Path) -> None:
    made_once(cache / "gguf/model", lambda place: place.mkdir())
    assert "removed 0 entries, 0 MiB; 1 in use" in kdcore("cache", "local", "--clear").out
    held = held_folder(cache / "shards/some")
    assert held_folder(cache / "shards/some") != held, "two may read it"
    assert "; 2 in use" in kdcore("cache", "local", "--clear").out
