"""A cache from an endpoint is the one that the model behind it would have made itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache, validate_cache
from kdcore.jobs.distill import distill
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.fixtures.apps.endpoint_app import Endpoint, error, page, served
from tests.tiny.distill_specs import chats_in, distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

K = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(seed=1), tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def endpoint(teacher: Path) -> Iterator[Endpoint]:
    model = load_model(ModelSpec.model_validate({"model": str(teacher)}))
    with served(Endpoint(model)) as running:
        yield running


def asked_of(endpoint: Endpoint, model: str = "tiny-chat") -> EndpointSpec:
    return EndpointSpec(endpoint=endpoint.url, model=model)


def test_it_is_the_cache_of_the_local_teacher(
    tmp_path: Path, teacher: Path, student: Path, endpoint: Endpoint
) -> None:
    spec = distill_spec(tmp_path, student)
    asked = build_cache(spec, tmp_path / "asked", endpoint=asked_of(endpoint), k=K, shard=20)
    local = build_cache(
        distill_spec(tmp_path, student, teacher={"model": str(teacher)}), tmp_path / "local", k=K
    )
    assert (asked.rows, asked.positions) == (local.rows, local.positions) == (9, 54)
    assert asked.manifest.teacher == "endpoint: tiny-chat"
    keys = list(local._places.keys)
    found, expected = (each.logits(keys, torch.device("cpu")) for each in (asked, local))
    assert torch.equal(found.ids, expected.ids)
    assert torch.allclose(found.logp, expected.logp, atol=2e-2)
    assert torch.allclose(found.tail, expected.tail, atol=2e-2)
    build_cache(spec, tmp_path / "asked", endpoint=asked_of(endpoint), k=K)
    assert len(endpoint.asked) == 9  # what is there is not asked again


def test_a_student_learns_from_it_without_any_teacher_here(
    tmp_path: Path, student: Path, endpoint: Endpoint
) -> None:
    folder, spec = tmp_path / "cache", distill_spec(tmp_path, student)
    build_cache(spec, folder, endpoint=asked_of(endpoint), k=K)
    data = {"teacher_cache": folder, "heldout": chats_in(tmp_path)}
    same_rows = {"epochs": 4, "batch_size": 9, "accumulation": 1}
    cached = distill_spec(tmp_path, student, data=data, training=same_rows)
    validate_cache(folder, cached)
    run = distill(cached)
    results = run.read_json("results.json")
    assert "perplexity" in results["after"] and "teacher_kl" not in results["after"]
    assert logged(run, "term/kd")[-1] < logged(run, "term/kd")[0]
    card = run.path("README.md").read_text()
    assert "# Distilled student" in card and "Teacher: cached log-probs only." in card


def test_a_cache_from_elsewhere_is_not_taken_for_the_teachers(
    tmp_path: Path, teacher: Path, student: Path, endpoint: Endpoint
) -> None:
    folder, spec = tmp_path / "cache", distill_spec(tmp_path, student)
    build_cache(spec, folder, endpoint=asked_of(endpoint), k=K)
    with pytest.raises(UserError, match="built with a different model"):
        validate_cache(folder, distill_spec(tmp_path, student, teacher={"model": str(teacher)}))
    TeacherCache(folder).check_shards()


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"instead": lambda text: page()}, "does not respond like an OpenAI-compatible"),
        ({"instead": lambda text: _without("top_logprobs")}, "does not echo the log-probs"),
        ({"most_logprobs": 5}, f"tokens, but --k is {K}"),
        (
            {"instead": lambda text: error(400, "", "prompt logprobs of 8, max allowed: 5")},
            "does not return the log-probs of 8 tokens: prompt logprobs of 8, max allowed: 5",
        ),
        ({"tokens_as_text": True}, "returns tokens as text"),
        ({"instead": lambda text: _with_other_tokens()}, "reads different tokens than it was sent"),
        ({"forge": lambda best: dict.fromkeys(best, 0.5)}, "invalid log-probs"),
        ({"forge": lambda best: dict.fromkeys(best)}, "does not respond like an OpenAI"),
        (
            {"forge": lambda best: {f"token_id:-{n}": -9.0 for n in range(1, 9)}},
            "invalid log-probs",
        ),
        ({"forge": lambda best: None}, "does not respond like an OpenAI"),
    ],
)
def test_what_an_endpoint_cannot_do_is_said(
    tmp_path: Path, student: Path, endpoint: Endpoint, wrong: dict[str, Any], cause: str
) -> None:
    for name, value in wrong.items():
        setattr(endpoint, name, value)
    with pytest.raises(UserError, match=cause):
        build_cache(
            distill_spec(tmp_path, student), tmp_path / "cache", endpoint=asked_of(endpoint), k=K
        )


def test_a_model_that_is_not_there_and_two_teachers_are_refused(
    tmp_path: Path, teacher: Path, student: Path, endpoint: Endpoint
) -> None:
    both = distill_spec(tmp_path, student, teacher={"model": str(teacher)})
    with pytest.raises(UserError, match="the cache takes its place"):
        build_cache(both, tmp_path / "cache", endpoint=asked_of(endpoint), k=K)
    with pytest.raises(UserError, match="the spec does not name a teacher to cache"):
        build_cache(distill_spec(tmp_path, student), tmp_path / "cache", k=K)


def _without(name: str) -> dict[str, Any]:
    found = {"tokens": ["token_id:1"], "top_logprobs": [{}]} | {name: None}
    return {"choices": [{"index": 0, "finish_reason": "length", "text": "", "logprobs": found}]}


def _with_other_tokens() -> dict[str, Any]:
    found = {"tokens": ["token_id:1"] * 99, "top_logprobs": [{"token_id:1": -1.0}] * 99}
    return {"choices": [{"index": 0, "finish_reason": "length", "text": "", "logprobs": found}]}
