"""The time of all cells of a comparison."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.jobs.preflight.comparison import total_seconds
from kdcore.specs.compare import CompareSpec

ROWS = {"name": "chat", "path": "rows.jsonl"}
SECONDS = {"responses": 100.0, "hidden states": 30.0, "training": 7.0}


def estimated(data: dict[str, Any], arms: dict[str, Any], **fields: Any) -> float:
    """The time of arms over two seeds, whose reports are alike."""
    base = {
        "job": "train-drafter",
        "target": {"model": "target"},
        "drafter": {"name": "medusa"},
        "data": {"train": ROWS, "heldout": ROWS} | data,
    }
    spec = CompareSpec.model_validate(
        {"job": "compare", "base": base, "arms": arms, "seeds": [0, 1]} | fields
    )
    report: Any = SimpleNamespace(seconds=SECONDS)
    return total_seconds(spec, dict.fromkeys(arms, report))


ALIKE = {"a": {}, "b": {"training": {"steps": 3}}, "c": {"training": {"epochs": 2}}}
ELSEWHERE = {"a": {}, "b": {"data": {"responses": {"folder": "b"}}}}
ANSWERED = {"responses": {"by": "target"}}


@pytest.mark.parametrize(
    ("data", "arms", "seconds"),
    [
        ({}, ALIKE, 6 * 137),  # the rows have responses
        (ANSWERED, ALIKE, 100 + 6 * 37),
        (ANSWERED, ELSEWHERE, 2 * 100 + 4 * 37),
        (ANSWERED | {"hidden_states": {"folder": "states"}}, ALIKE, 130 + 6 * 7),
        ({"hidden_states": {}}, ALIKE, 6 * 137),  # each cell stores its own
    ],
)
def test_what_cells_share_is_counted_once(
    data: dict[str, Any], arms: dict[str, Any], seconds: float
) -> None:
    assert estimated({"responses": {"by": "dataset"}} | data, arms) == seconds


def test_what_the_points_of_a_grid_do_not_share_is_counted_for_each() -> None:
    """The teacher answers three files for both arms; rates and lengths share the responses."""
    grid = {
        "data.train.path": ["a.jsonl", "b.jsonl", "c.jsonl"],
        "data.max_length": [64, 128],
    }
    chosen: dict[str, Any] = {"grid": grid, "validation": ROWS | {"limit": 1}}
    seconds = estimated(ANSWERED, {"a": {}, "b": {"training": {"steps": 3}}}, **chosen)
    assert seconds == 3 * 100 + 2 * (3 * 2 + 2) * 37
