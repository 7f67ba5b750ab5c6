"""What several tests stand on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.fixtures.reader import Reader


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors gain nothing from more, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to install distributions into; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tests.fixtures.reader.make_world`."""
    from tests.fixtures.reader import make_world  # heavy, and few tests need it

    return make_world(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def reader(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Reader:
    """A reader in a project folder of its own."""
    from kdcore.jobs.preflight import estimates
    from kdcore.jobs.preflight import train_drafter as drafter_preflight
    from tests.fixtures.reader import Reader

    for module in (estimates, drafter_preflight):  # half a second for each command that estimates
        monkeypatch.setattr(module, "throughput", lambda *_, **__: 1e10)
    for job in ("train_drafter", "bench"):
        monkeypatch.setattr(f"kdcore.jobs.{job}.REPLAYED", 8)
    monkeypatch.setattr("kdcore.decoding.round_cost.REPEATS", 1)
    project = tmp_path / "project"
    shutil.copytree(world / "project", project)
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(world / "site")
    monkeypatch.setenv("KDCORE_CACHE", str(world / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdin", None)  # so that what the reader types is taken back
    return Reader(capsys)
