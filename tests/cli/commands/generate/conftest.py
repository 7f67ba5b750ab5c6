"""``kdcore generate`` in this process, with a tiny target."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.models.loading.loaded import LoadedModel
from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.cli.conftest import Said
from tests.tiny.tiny_chat_models import saved, tiny_model

Generate = Callable[..., Said]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    loaded = tiny_model()
    return loaded, saved(loaded, tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(
    target: tuple[LoadedModel, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Generate:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*arguments: str) -> Said:
        console.out.cache_clear()
        console.err.cache_clear()
        code = main.run(["generate", str(target[1]), *arguments])
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run
