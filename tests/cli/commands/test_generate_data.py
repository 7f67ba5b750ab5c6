"""``kdcore generate-data``, from its starter to its one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kdcore.components import registry
from kdcore.components.registry import Registry
from tests.cli.conftest import Kdcore
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture
def installed() -> Registry:
    """The real one."""
    return registry.installed()


def test_from_the_starter_to_the_responses(kdcore: Kdcore, tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path / "teacher")
    assert kdcore("init", "spec.yaml", "--job", "generate-data").code == 0
    changes = ["teacher.model=teacher", "source.limit=4", "responses.max_new_tokens=5"]
    sets = [word for change in changes for word in ("--set", change)]
    checked = kdcore("check", "spec.yaml", *sets)
    assert checked.code == 0, checked.err
    assert re.search(r"maximum tokens +20\b", checked.out)
    assert checked.out.splitlines()[-1].startswith("ready: kdcore generate-data spec.yaml --set")
    assert json.loads(kdcore("check", "spec.yaml", *sets, "--json").out)["responses"] == 4
    said = kdcore("generate-data", "spec.yaml", *sets)
    assert said.code == 0, said.err
    line = r"4 responses, \d+% with an end token; \d+ new tokens, \d+ tokens/s: (.*)\n"
    (path,) = re.fullmatch(line, said.out).groups()  # type: ignore[union-attr]
    assert len(Path(path).read_text().splitlines()) == 4
    assert "tokens_per_second" in said.err
    again = kdcore("generate-data", "spec.yaml", *sets, "--resume")
    assert "; 0 new tokens, 0 tokens/s: " in again.out
    assert kdcore("schema", "generate-data").code == 0
