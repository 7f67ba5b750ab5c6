"""A teacher and rows that comparisons share, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import chat
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def base(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    rows = [chat(n) for n in range(8)]
    write_lines(folder / "rows.jsonl", rows)
    source = {"name": "chat", "path": str(folder / "rows.jsonl")}
    return {
        "teacher": {"model": str(saved(tiny_model(), folder / "teacher"))},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"samples": 0, "answers": ["rouge_l"], "answer_tokens": 4},
    }


@pytest.fixture
def kdcore(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command line in this process; its cells are processes of their own all the same."""

    def run(*arguments: Any) -> SimpleNamespace:
        console.out.cache_clear()  # pytest's capture has replaced the streams
        console.err.cache_clear()
        code = main.run([*map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run
