"""An optional package that is absent, too old or broken is one line of cause and one of cure."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcore.components import optional_packages
from kdcore.components.job import Job
from kdcore.components.optional_packages import broken_package, import_early, optional_package
from kdcore.errors import UserError

USER = "the engine openvino requires"


@pytest.fixture(autouse=True)
def _versions_are_read() -> Iterator[None]:
    optional_packages._versions.cache_clear()
    yield
    optional_packages._versions.cache_clear()


def refused(module: str = "openvino") -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        optional_package(module, "kdcore[openvino]", "the engine openvino", instead="use torch")
    return caught.value.cause, caught.value.cure


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    cause = f"{USER} the package openvino, which is not installed"
    assert refused() == (cause, 'run: pip install "kdcore[openvino]", or use torch')
    assert import_early("openvino") is None


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_packages, "version", lambda package: "2025.1")
    cause = f"{USER} openvino >=2026.4, and 2025.1 is installed"
    assert refused() == (cause, 'run: pip install "kdcore[openvino]", or use torch')
    optional_packages._versions.cache_clear()
    monkeypatch.setattr(optional_packages, "version", lambda package: "2026.5rc1")
    assert optional_package("json", "kdcore[openvino]", "x", package="openvino").__name__ == "json"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import a_dependency", "ModuleNotFoundError: No module named 'a_dependency'"),
        ("raise RuntimeError('libfoo.so\\nand more')", "RuntimeError: libfoo.so"),
        ("raise SystemExit", "SystemExit: SystemExit"),
    ],
)
def test_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    (tmp_path / "broken_here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cause, cure = refused("broken_here")
    assert cause == f"{USER} the package broken-here, whose import fails: {said}"
    assert cure == "run: pip install --force-reinstall broken-here, or use torch"
    assert import_early("broken_here") is None


def test_a_package_that_breaks_transformers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a torchvision for CUDA does beside a torch for CPUs."""
    (tmp_path / "other_vision.py").write_text("raise RuntimeError('operator nms is unknown')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def as_transformers_does() -> None:
        try:
            importlib.import_module("other_vision")
        except Exception as fault:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'. Are") from fault

    with pytest.raises(ModuleNotFoundError) as raised:
        as_transformers_does()
    told = broken_package(raised.value)
    assert told is not None and told.cause == (
        "transformers imports the package other_vision, whose import fails: RuntimeError: "
        "operator nms is unknown"
    )
    assert told.cure.endswith("or run: pip uninstall other_vision")
    assert broken_package(ModuleNotFoundError("No module named 'x'")) is None
    (tmp_path / "a_job.py").write_text(
        "try:\n    import other_vision\nexcept RuntimeError as fault:\n"
        "    raise ModuleNotFoundError(\"Could not import module 'X'\") from fault\n"
    )
    job = Job(name="one", work="a_job:work", model="a_job:Spec", summary="a job", template="x:y")
    with pytest.raises(UserError, match="transformers imports the package other_vision"):
        job.imported("work")
