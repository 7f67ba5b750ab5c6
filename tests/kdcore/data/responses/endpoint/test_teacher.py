"""A served teacher teaches what the cache from the same server does, and is asked ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase

from kdcore.data.responses.endpoint.teacher import _Server
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.loading.load import load_model
from kdcore.runs.progress import Silent
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.training.trainer.lookahead import Lookahead
from tests.fixtures.apps.endpoint_app import Endpoint, completion, error, served
from tests.tiny.distill_specs import distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

K = 8
GONE = error(503, "", "shutting down")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(seed=1), tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = saved(tiny_model(), tmp_path_factory.mktemp("models") / "teacher")
    with served(Endpoint(load_model(ModelSpec(model=str(folder))))) as running:
        yield running


def teacher_of(server: Endpoint, **changes: Any) -> dict[str, Any]:
    return {"endpoint": server.url, "model": "tiny-chat", "k": K, **changes}


def scored(server: Endpoint) -> list[tuple[int, ...]]:
    """The rows that a server scored, without the checks."""
    prompts = [body["prompt"] for body in server.asked if "prompt" in body]
    return [tuple(prompt) for prompt in prompts if not isinstance(prompt, str)]


def test_the_losses_are_those_of_the_cache_from_the_same_server(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    live = distill(distill_spec(tmp_path, student, teacher=teacher_of(server)))
    assert len(scored(server)) == 2 * 9  # each row once in each epoch
    plain = distill_spec(tmp_path / "cached", student)
    build_cache(
        plain, tmp_path / "c", endpoint=EndpointSpec(endpoint=server.url, model="tiny-chat"), k=K
    )
    cached = distill(
        distill_spec(tmp_path / "cached", student, data={"teacher_cache": str(tmp_path / "c")})
    )
    assert logged(live) == logged(cached)
    assert len(logged(live)) == 6
    assert "Teacher: `tiny-chat` behind a server." in live.path("README.md").read_text()
    assert all(seconds >= 0 for seconds in logged(live, "teacher_wait"))


def test_responses_that_the_student_samples_are_scored_too(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    data = {"on_policy": {"probability": 1.0, "max_new_tokens": 5}}
    spec = distill_spec(tmp_path, student, teacher=teacher_of(server), data=data)
    run = distill(spec)
    rows = scored(server)
    assert len(rows) == 2 * 9  # and none of the data, which no step reads
    assert len(set(rows)) > 9
    assert all(value > 0 for value in logged(run))


def test_servers_share_the_rows_and_one_that_fails_rests(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, line: str) -> None:
            notes.append(line)

    with served(Endpoint(server.model)) as other:
        spec = distill_spec(tmp_path, student, teacher=teacher_of(server, replicas=[other.url]))
        server.pause = other.pause = 0.01
        alike = distill(spec)
        assert min(len(scored(server)), len(scored(other))) >= 4
        server.asked.clear()
        server.instead = lambda text: GONE if len(server.asked) > 2 else None  # after the checks
        teacher = teacher_of(server, replicas=[other.url])
        again = distill(
            distill_spec(tmp_path / "again", student, teacher=teacher), progress=Notes()
        )
        assert logged(again) == logged(alike)
    assert [line for line in notes if line.startswith(f"teacher: {server.url} returned an error")]


def test_requests_that_fail_together_are_one_failure() -> None:
    away: Any = _Server(scorer=None, client=None)  # type: ignore[arg-type]
    for _ in range(8):
        away.rest()
    assert away.failures == 1


def test_a_server_that_stays_away_ends_the_run_in_one_line(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    server.instead = lambda text: GONE if len(server.asked) > 3 else None
    with pytest.raises(
        UserError, match=r"no server of the teacher has answered for 0\.5 s"
    ) as wrong:
        distill(distill_spec(tmp_path, student, teacher=teacher_of(server, timeout=0.5)))
    assert wrong.value.cure == "start the server, then rerun with --resume"


def test_another_tokenizer_or_template_is_refused(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    server.model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="renders chats by another template"):
        distill(distill_spec(tmp_path, student, teacher=teacher_of(server)))
    server.model.tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(UserError, match="encodes a text by another tokenizer"):
        distill(distill_spec(tmp_path, student, teacher=teacher_of(server)), overwrite=True)


def test_tokens_of_another_form_are_refused(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    server.instead = lambda text: completion("so") | {"prompt_token_ids": 3} if text else None
    with pytest.raises(UserError, match="does not respond like an OpenAI-compatible endpoint"):
        distill(distill_spec(tmp_path, student, teacher=teacher_of(server)))


def test_a_method_that_needs_more_classes_is_refused_before_any_request(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    gates = {"gates": [{"name": "speckd", "verification": "sampling"}]}
    spec = distill_spec(tmp_path, student, teacher=teacher_of(server), method=gates)
    with pytest.raises(UserError, match=f"requests only from {server.url} the top {K}") as wrong:
        preflight(spec)
    assert "raise teacher.k" in wrong.value.cure
    report = preflight(distill_spec(tmp_path, student, teacher=teacher_of(server)))
    assert report.served_teacher == f"the top {K} of tiny-chat at {server.url}"
    assert report.servers, "the time of whose answers the estimate leaves out"
    assert server.asked == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"data": {"responses": {"by": "teacher"}}}, "data.responses.by=teacher needs a teacher"),
        ({"data": {"on_policy": {"policy": "interleaved"}}}, "interleaved needs a teacher on this"),
        ({"data": {"teacher_cache": "c"}}, "another teacher of the same rows"),
    ],
)
def test_what_needs_a_teacher_on_this_machine_is_refused(
    tmp_path: Path, student: Path, changes: dict[str, Any], cause: str
) -> None:
    teacher = {"endpoint": "http://localhost:1/v1", "model": "large"}
    with pytest.raises(ValueError, match=cause):
        distill_spec(tmp_path, student, teacher=teacher, **changes)


def test_batches_are_read_ahead_of_their_consumer() -> None:
    read: list[tuple[str, int]] = []
    batches = Lookahead(iter("abcde"), 2, lambda batch, number: read.append((batch, number)))
    assert next(batches) == "a"
    assert read == [("a", 0), ("b", 1), ("c", 2)]
    assert list(batches) == ["b", "c", "d", "e"]
    assert [number for _, number in read] == [0, 1, 2, 3, 4]


def test_the_refusal_of_more_log_probs_than_the_server_gives_names_the_cure(
    tmp_path: Path, student: Path, server: Endpoint
) -> None:
    server.most_logprobs = 5
    with pytest.raises(UserError, match=rf"log-probs of \d tokens, but teacher.k is {K}") as wrong:
        distill(distill_spec(tmp_path, student, teacher=teacher_of(server)))
    assert wrong.value.cure.endswith(", or let the server return more (vLLM: --max-logprobs 8)")
