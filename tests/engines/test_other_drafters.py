"""Drafters in vLLM's own methods: drafts equal to kdcore's, output unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.served import (
    NEW,
    PROMPTS,
    Served,
    compare_drafts,
    continued,
    drafter_in,
    target_in,
)


@pytest.mark.parametrize(
    ("name", "steps", "params"),
    [
        ("eagle3", 30, {"features": (1, 2, 3), "vocabulary": 90}),
        ("medusa", 30, {}),
        ("p_eagle", 30, {"features": (1, 3), "layers": 2}),
        ("p_eagle", 30, {"features": (1, 2, 3), "layers": 1, "vocabulary": 90}),
        ("dflash", 30, {"features": (1, 3), "layers": 2}),
        ("dflash", 15, {"features": (2,), "layers": 1, "vocabulary": 90}),
    ],
)
def test_drafts_and_output(
    name: str, steps: int, params: dict, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    target = target_in(tmp_path / "target")
    exported = drafter_in(tmp_path, target, name, steps, **params)
    served = serve(target.name, exported.settings)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == [each + continued(target, each, NEW) for each in PROMPTS]
    assert compare_drafts(served, exported, target, texts) > NEW
    # after 30 steps, the target accepts all drafts of the larger dflash
    assert 0 < served.metric("accepted_tokens") <= served.metric("draft_tokens")
