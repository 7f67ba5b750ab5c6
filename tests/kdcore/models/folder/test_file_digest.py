"""The digest of a file is that of its present content, whatever clock and cache are like."""

import hashlib
import os
from pathlib import Path

import pytest

from kdcore.models.folder.files import file_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("in_place", [True, False])
def test_another_content_of_the_same_size_and_time(tmp_path: Path, in_place: bool) -> None:
    """As archives, `cp -p` and reproducible builds leave it, or a clock that goes back."""
    file, other = tmp_path / "model.safetensors", tmp_path / "other"
    file.write_bytes(b"first")
    os.utime(file, (1, 1))
    assert file_digest(file) == sha256(b"first")
    before = file.stat()
    (file if in_place else other).write_bytes(b"other")
    if not in_place:
        other.replace(file)
    os.utime(file, (1, 1))
    while in_place and file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock has coarse ticks
        os.utime(file, (1, 1))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file_digest(file) == sha256(b"other")


def test_a_digest_is_cached(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    file_digest(file)
    (known,) = (cache / "sha256").iterdir()
    known.write_text("0" * 64)
    assert file_digest(file) == "0" * 64
    known.write_text("")  # the machine crashed
    assert file_digest(file) == sha256(b"weights") == known.read_text()


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    assert file_digest(file) == sha256(b"weights")
