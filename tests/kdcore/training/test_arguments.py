"""What of a spec's training section reaches the processes."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from kdcore.training import arguments


@pytest.mark.parametrize(
    ("trainer", "seconds"),
    [
        ({"ddp_timeout": 7200}, 7200),
        ({}, TrainingArguments.ddp_timeout),
        ({"ddp_timeout": "x"}, 1800),
    ],
)
def test_processes_wait_for_each_other_as_long_as_the_spec_says(
    monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any], seconds: int
) -> None:
    """A wrong type is refused later, with the name of the field."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(arguments, "PartialState", lambda **each: given.update(each))
    spec: Any = SimpleNamespace(training=SimpleNamespace(trainer=trainer))
    arguments.processes(spec)
    assert given["timeout"] == timedelta(seconds=seconds)
