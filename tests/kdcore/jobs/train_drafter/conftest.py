"""The target that the drafters are trained for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("target"))
