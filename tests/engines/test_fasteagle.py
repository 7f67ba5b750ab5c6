"""FastEagle in vLLM: its drafts are kdcore's, token for token, and the output does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.errors import UserError
from kdcore.models.loading.loaded import LoadedModel
from tests.engines.served import (
    NEW,
    PROMPTS,
    Exported,
    Served,
    compare_drafts,
    continued,
    counted,
    drafter_in,
    target_in,
)

Serve = Callable[..., Served]
FEATURES = {"features": (1, 2, 3)}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return target_in(tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture(scope="module")
def plain(target: LoadedModel) -> list[list[int]]:
    """What vLLM generates without a drafter."""
    served = Served.start(target.name, None)
    texts = list(served.generate(PROMPTS).values())
    served.stop()
    return texts


@pytest.fixture(scope="module")
def untrained(target: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return drafter_in(tmp_path_factory.mktemp("untrained"), target, "fasteagle", **FEATURES)


@pytest.fixture(scope="module")
def trained(target: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return drafter_in(
        tmp_path_factory.mktemp("trained"), target, "fasteagle", 60, vocabulary=90, **FEATURES
    )


def test_untrained_in_a_batch(
    target: LoadedModel, untrained: Exported, plain: list[list[int]], serve: Serve
) -> None:
    served = serve(target.name, untrained.settings)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == plain
    assert compare_drafts(served, untrained, target, texts) > 3 * NEW * len(PROMPTS) // 2


def test_trained_with_a_draft_vocabulary(
    target: LoadedModel, trained: Exported, plain: list[list[int]], serve: Serve
) -> None:
    """The counts are equal too: vLLM's first token of a request has no draft, and it counts all
    that a round accepts, beyond the limit of the request as well."""
    served = serve(target.name, trained.settings)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == plain
    assert compare_drafts(served, trained, target, texts) > 100
    split = [
        (prompt, text[len(prompt) :]) for prompt, text in zip(PROMPTS, texts.values(), strict=True)
    ]
    rounds, accepted = counted(target, trained, split)
    assert sum(accepted) > rounds  # most drafts are right, and some are wrong
    assert min(accepted) < rounds
    assert served.metric("drafts") == rounds
    assert served.metric("accepted_tokens") == sum(accepted)
    assert served.metric("accepted_tokens_per_pos") == accepted


SHARED = [(11 * place) % 280 for place in range(100)]
"""What long prompts begin with: three blocks of the cache."""


def test_fewer_tokens_than_levels_with_prefixes_from_the_cache(
    target: LoadedModel, trained: Exported, serve: Serve
) -> None:
    settings = trained.settings | {"num_speculative_tokens": 2}
    served = serve(target.name, settings, max_num_seqs=3, enable_prefix_caching=True)
    prompts = [SHARED + prompt for prompt in PROMPTS]
    for _ in range(2):
        texts = served.generate(prompts)
        assert list(texts.values()) == [each + continued(target, each, NEW) for each in prompts]
        assert compare_drafts(served, trained, target, texts) > NEW
    assert {len(drafts) for _, _, drafts in served.rounds} == {2}
    hits = next(m for m in served.llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    assert hits.value > 0


def test_prompts_in_pieces(target: LoadedModel, trained: Exported, serve: Serve) -> None:
    served = serve(
        target.name, trained.settings, max_num_batched_tokens=24, enable_prefix_caching=False
    )
    prompts = [SHARED + prompt for prompt in PROMPTS]
    texts = served.generate(prompts)
    assert list(texts.values()) == [each + continued(target, each, NEW) for each in prompts]
    assert compare_drafts(served, trained, target, texts) > NEW
    assert len([rows for _, rows in served.passes if rows < len(SHARED)]) > 2 * len(PROMPTS)


def test_one_token(
    target: LoadedModel, untrained: Exported, plain: list[list[int]], serve: Serve
) -> None:
    served = serve(target.name, untrained.settings | {"num_speculative_tokens": 1})
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == plain
    assert compare_drafts(served, untrained, target, texts) > NEW


def test_compiled(target: LoadedModel, untrained: Exported, serve: Serve) -> None:
    served = serve(target.name, untrained.settings, enforce_eager=False)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == [each + continued(target, each, NEW) for each in PROMPTS]
    assert compare_drafts(served, untrained, target, texts) > 3 * NEW * len(PROMPTS) // 2


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("qwen2", {"features": (0, 3), "normalise": False}),
        ("qwen3", {"depth": 4, "features": (1, 2, 3), "ffn": 40}),
        ("mistral", {"features": (1, 2, 3)}),
    ],
)
def test_other_families(family: str, params: dict, tmp_path: Path, serve: Serve) -> None:
    target = target_in(tmp_path / "target", family)
    exported = drafter_in(tmp_path, target, "fasteagle", **params)
    served = serve(target.name, exported.settings)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == [each + continued(target, each, NEW) for each in PROMPTS]
    assert compare_drafts(served, exported, target, texts) > 3 * NEW * len(PROMPTS) // 2


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"num_speculative_tokens": 4}, "num_speculative_tokens is 4, but the drafter has 3"),
        ({"parallel_drafting": False}, "parallel_drafting is off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict, cause: str, target: LoadedModel, untrained: Exported
) -> None:
    with pytest.raises(UserError, match=cause):
        Served.start(target.name, untrained.settings | changes)


def test_another_target_is_refused(untrained: Exported, tmp_path: Path) -> None:
    other = target_in(tmp_path / "other", "deeper")
    with pytest.raises(UserError, match="exported for a target whose number of layers is 4"):
        Served.start(other.name, untrained.settings)
