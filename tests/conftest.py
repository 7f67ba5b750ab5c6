"""What several tests stand on, and what some need that a machine may lack."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from tests.fixtures import browser

if TYPE_CHECKING:
    from tests.fixtures.reader import Reader


class Need(NamedTuple):
    """Whether this machine has it, and how to get it."""

    met: Callable[[], bool]
    cure: str


NEEDS = {
    "public data": Need(
        lambda: bool(os.environ.get("KDCORE_DATA")),
        "run `make data`, or export KDCORE_DATA=FOLDER",
    ),
    "Pillow": Need(lambda: find_spec("PIL") is not None, "run `make venv`"),
    "Ray": Need(lambda: find_spec("ray") is not None, "run `make venv`"),
    "chromium": Need(lambda: browser.program() is not None, "put chromium on the path"),
}
"""What ``@pytest.mark.needs(...)`` can name. Nothing else keeps a test from being run."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(what): run only with {' or '.join(NEEDS)}")
    if folder := os.environ.get("KDCORE_DATA"):  # tests change the working directory
        os.environ["KDCORE_DATA"] = str(Path(folder).resolve())


LONG = (
    "tests/plugins/test_conformance.py",
    "tests/repository/",
    "tests/device/",
    "tests/kdcore/jobs/",
    "tests/kdcore/testing/",
    "tests/plugins/test_openvino.py",
)
"""The files of these come first: one that begins last would leave the other worker without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_collection_finish() -> None:
    """Each run of transformers' trainer collects garbage; what is imported by now is none."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        what: str = mark.args[0]
        if not NEEDS[what].met():
            if os.environ.get("CI") == "true":
                pytest.fail(f"needs {what}: {NEEDS[what].cure}", pytrace=False)
            pytest.skip(f"needs {what}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """One line, below everything but pytest's own counts, of what this machine does not test."""
    yield
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    counts = {what: reasons.count(f"Skipped: needs {what}") for what in NEEDS}
    lacking = [f"{n} need {what} ({NEEDS[what].cure})" for what, n in counts.items() if n]
    if lacking:
        terminalreporter.write_line(f"TESTS NOT RUN: {', '.join(lacking)}", yellow=True, bold=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors gain nothing from more, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoded rows stay out of the developer's cache."""
    os.environ["KDCORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
def fork_server() -> None:
    """Begun before a comparison begins one, which would import less."""
    from tests.fixtures.processes.forked import forks

    forks()


@pytest.fixture(scope="session")
def dequantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``KDCORE_CACHE`` that all workers share, since a real GGUF file takes long."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "dequantised"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tests.fixtures.reader.make_world`."""
    from tests.fixtures.reader import make_world  # heavy, and few tests need it

    return make_world(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def reader(
    world: Path,
    fork_server: None,
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
    monkeypatch.setattr("kdcore.jobs.preflight.rows.SAMPLE", 16)  # for each arm of a comparison
    for job in ("train_drafter", "bench"):
        monkeypatch.setattr(f"kdcore.jobs.{job}.REPLAYED", 8)
    monkeypatch.setattr("kdcore.decoding.trials.round_cost.REPEATS", 1)
    project = tmp_path / "project"
    shutil.copytree(world / "project", project)
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(world / "site")
    monkeypatch.setenv("KDCORE_CACHE", str(world / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdin", None)  # so that what the reader types is taken back
    return Reader(capsys)
