"""What a method needs of its models is told as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.models.fit.method import refuse_features


@pytest.mark.parametrize(
    ("teacher", "cache", "cause"),
    [
        (None, None, "there is no teacher to compare hidden states with"),
        (None, "cache", "a teacher cache does not contain hidden states"),
        (object(), "cache", "a teacher cache does not contain hidden states"),
    ],
)
def test_hidden_states_that_are_missing(teacher: Any, cache: Any, cause: str) -> None:
    spec: Any = SimpleNamespace(
        teacher=teacher, teachers={}, served_teacher=None, data=SimpleNamespace(teacher_cache=cache)
    )
    objective: Any = SimpleNamespace(weights={"feature": 1.0})
    models: Any = SimpleNamespace(teacher=teacher)
    with pytest.raises(UserError, match=cause):
        refuse_features(spec, objective, models)
