"""An endpoint answers as the model behind it would; what is wrong with it is told plainly."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.endpoint.answers import EndpointAnswers
from kdcore.data.responses.endpoint.client import EndpointClient, RequestLoop
from kdcore.data.responses.file import Responses, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.data.responses.score import Answered
from kdcore.errors import UserError
from kdcore.models.loading.load import load_model
from kdcore.runs.progress import Silent
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.parts.training import GenerationSpec
from kdcore_baselines.scores.judge import WinRate
from tests.fixtures.apps.endpoint_app import KEY, Endpoint, completion, error, page, served
from tests.fixtures.processes.forked import python
from tests.tiny.tiny_chat_models import saved, tiny_model

SETTINGS = GenerationSpec(max_new_tokens=8, batch_size=3)
WORDS = ["the mat", "why", "the student sat", "so", "for the mat", "and", "ok?"]


def ask(*texts: str, **facts: Any) -> Conversation:
    return Conversation("/".join(texts), tuple(Message("user", text) for text in texts), **facts)


ASKED = [ask(word) for word in WORDS]
JUDGED = [Answered("row", ({"role": "user", "content": "why?"},), "mine", "yours")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(seed=1)
    head = model.model.get_output_embeddings().weight  # so that some responses end and some do not
    head[model.tokenizer.eos_token_id] *= 3
    return saved(model, tmp_path_factory.mktemp("endpoint") / "tiny")


@pytest.fixture
def endpoint(folder: Path) -> Iterator[Endpoint]:
    with served(Endpoint(load_model(ModelSpec(model=str(folder))))) as running:
        yield running


def answered(
    url: str, path: Path, asked: list[Conversation] = ASKED, model: str = "tiny-chat",
    key: str | None = None, **settings: Any,
) -> Responses:  # fmt: skip
    spec = EndpointSpec(endpoint=url, model=model, key=key)
    answerer = EndpointAnswers(spec, SETTINGS.model_copy(update=settings))
    found = respond(asked, answerer, path / "responses.jsonl", Silent())
    return replace(found, conversations=list(found.conversations))


def local(folder: Path, path: Path, asked: list[Conversation]) -> list[Conversation]:
    """The texts that the model generates here; an endpoint does not return tokens."""
    model = load_model(ModelSpec(model=str(folder)))
    given = respond(asked, ModelAnswers(model, SETTINGS), path / "local.jsonl", Silent())
    return [
        replace(c, tokenizer="", messages=tuple(replace(m, tokens=()) for m in c.messages))
        for c in given.conversations
    ]


def complaint(*given: Any, **more: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        answered(*given, **more)
    assert "\n" not in raised.value.cause + raised.value.cure
    return raised.value


def test_what_transformers_serves_answers_as_the_model_does(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", folder.name, "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            try:
                assert httpx.get(f"{url}/health").status_code == 200
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.2)
        asked = [*ASKED[:3], ask("why", "so")]
        given = answered(f"{url}/v1", tmp_path, asked, model=folder.name)
        assert given.conversations == local(folder, tmp_path, asked)
        assert given.tokens > 0
        wrong = complaint(f"{url}/v1", tmp_path / "other", model="another")
        assert "another" in wrong.cause
    finally:
        server.kill()
        server.wait()


def test_conversations_are_answered_turn_by_turn_as_the_model_would(
    endpoint: Endpoint, folder: Path, tmp_path: Path
) -> None:
    system = Conversation("s", (Message("system", "the cat"), Message("user", "so")))
    asked = [*ASKED, ask("why", "so", "and"), system]
    given = answered(endpoint.url, tmp_path, asked)
    assert given.conversations == [
        c for c in local(folder, tmp_path, asked) if all(m.content.strip() for m in c.messages)
    ]
    ended = {m.ended for c in given.conversations for m in c.messages if m.role == "assistant"}
    assert ended == {True, False}  # the test sees both
    assert given.tokens == endpoint.tokens > 0


def test_no_more_requests_are_under_way_than_asked_for(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.pause = 0.1
    answered(endpoint.url, tmp_path)
    assert endpoint.most == 3


def test_what_is_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    answered(endpoint.url, tmp_path, ASKED[:2], temperature=0.5, seed=4)
    seeds = {body["messages"][0]["content"]: body.pop("seed") for body in endpoint.asked}
    assert seeds == {"the mat": 4, "why": 5}
    for body in endpoint.asked:
        assert len(body.pop("messages")) == 1
        assert body == {"model": "tiny-chat", "max_tokens": 8, "temperature": 0.5, "top_p": 1.0}


def test_an_interrupted_job_asks_for_the_rest_only(endpoint: Endpoint, tmp_path: Path) -> None:
    whole = answered(endpoint.url, tmp_path / "whole")
    endpoint.asked.clear()

    def broken(text: str) -> Any:
        return error(422, "broken", "broken") if text == "for the mat" else None

    endpoint.instead = broken
    wrong = complaint(endpoint.url, tmp_path, batch_size=1)
    assert wrong.cause == f"{endpoint.url} returned an error: broken"
    kept = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept] == WORDS[:4]
    endpoint.instead = lambda text: None
    endpoint.asked.clear()
    assert answered(endpoint.url, tmp_path).conversations == whole.conversations
    assert {body["messages"][0]["content"] for body in endpoint.asked} == set(WORDS[4:])
    endpoint.asked.clear()
    again = answered(endpoint.url, tmp_path)
    assert (again.conversations, again.tokens) == (whole.conversations, 0)
    assert endpoint.asked == []


def test_another_model_or_setting_is_another_file(endpoint: Endpoint, tmp_path: Path) -> None:
    answered(endpoint.url, tmp_path, ASKED[:1])
    warmer = complaint(endpoint.url, tmp_path, temperature=1)
    assert "a different temperature and seed" in warmer.cause
    assert "a different model" in complaint(endpoint.url, tmp_path, model="other").cause


def test_a_server_that_stumbles_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    stumbles = [error(500, "", "oh"), error(429, "", "slow down")]
    endpoint.instead = lambda text: stumbles.pop() if stumbles else None
    assert len(answered(endpoint.url, tmp_path).conversations) == len(ASKED)


def test_an_answer_that_is_none_leaves_its_conversation_out(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, line: str) -> None:
            notes.append(line)

    instead = {
        "the mat": completion("  "),
        "why": completion(None),
        "so": completion("I may not", "content_filter"),
        "ok?": Response(
            json.dumps(completion("half a smile \ud83d")), media_type="application/json"
        ),
        "and": error(400, "context_length_exceeded", "the context length is 512"),
    }
    endpoint.instead = instead.get
    spec = EndpointSpec(endpoint=endpoint.url, model="tiny-chat")
    answerer = EndpointAnswers(spec, SETTINGS)
    given = respond(ASKED, answerer, tmp_path / "responses.jsonl", Notes())
    assert [c.id for c in given.conversations] == ["the student sat", "for the mat"]
    reason = "tiny-chat returned an empty answer, or they are too long for its context"
    assert notes == [f"left out 5 of 7 conversations: {reason}"]
    endpoint.instead = lambda text: completion([{"type": "text", "text": "a part"}])
    wrong = complaint(endpoint.url, tmp_path / "other")
    assert wrong.cause == f"none of the 7 conversations was answered: {reason}"


def test_what_is_wrong_is_told(endpoint: Endpoint, tmp_path: Path) -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        assert complaint(nobody, tmp_path / "1").cause == f"cannot reach {nobody}"
    unknown = complaint(endpoint.url, tmp_path / "2", model="tiny-chta")
    assert unknown.cause == f"{endpoint.url} does not serve a model 'tiny-chta'"
    assert unknown.cure == "did you mean 'tiny-chat'?"
    wrong = complaint(endpoint.url.removesuffix("/v1"), tmp_path / "3")
    assert "/v1" in wrong.cure
    endpoint.instead = lambda text: page()
    wrong = complaint(endpoint.url, tmp_path / "4")
    assert wrong.cause.endswith("does not respond like an OpenAI-compatible endpoint")
    plain = complaint(endpoint.url, tmp_path / "5", [ask("once upon", plain=True)])
    assert "template: none" in plain.cause
    endpoint.instead = lambda text: error(422, "", "none of these")
    told = complaint(endpoint.url, tmp_path / "6")
    assert told.cause.endswith("returned an error: none of these"), "without a key, none is hidden"


def test_the_key_is_sent_and_stands_nowhere(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.wants_key = True
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    assert "requires a key" in complaint(endpoint.url, tmp_path).cause
    assert all("somebody-elses" not in str(headers) for headers in endpoint.headers)
    monkeypatch.delenv("TINY_KEY", raising=False)
    unset = complaint(endpoint.url, tmp_path, key="TINY_KEY")
    assert unset.cause == "the environment variable TINY_KEY is not set"
    monkeypatch.setenv("TINY_KEY", "sk-wrong")
    refused = complaint(endpoint.url, tmp_path, key="TINY_KEY")
    assert refused.cause == f"{endpoint.url} rejects the key in TINY_KEY"
    monkeypatch.setenv("TINY_KEY", KEY)
    for before in ("what is ", "x" * 295):  # cut inside the key
        endpoint.instead = lambda text, before=before: error(422, "", f"{before}{KEY}?")
        told = complaint(endpoint.url, tmp_path, key="TINY_KEY")
        assert told.cause.endswith(f"returned an error: {before}...?")
    monkeypatch.setenv("TINY_KEY", f"{KEY} \u00e9")  # no header can carry it
    unfit = complaint(endpoint.url, tmp_path, key="TINY_KEY")
    assert unfit.cause.startswith(
        "the environment variable TINY_KEY does not hold a key: its value"
    )
    monkeypatch.setenv("TINY_KEY", KEY)
    endpoint.instead = lambda text: None
    assert len(answered(endpoint.url, tmp_path, key="TINY_KEY").conversations) == len(ASKED)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written and KEY.encode() not in written and b"sk-wrong" not in written


def test_the_client_library_is_imported_when_it_is_used_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys, kdcore.jobs.generate_data, kdcore_cli.main; assert 'openai' not in sys.modules"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(sys.modules, "openai", None)
    wrong = complaint("http://localhost:1/v1", tmp_path)
    assert (wrong.cause, wrong.cure) == (
        "an endpoint requires the package openai, which is not installed",
        'run: pip install "kdcore[endpoint]"',
    )  # fmt: skip


async def _slowly() -> Any:
    while True:
        yield b" "
        await asyncio.sleep(0.02)


def _zeros() -> Any:
    yield from itertools.repeat(b" " * 2**20, 3000)


def _bomb() -> bytes:
    """17 MB in 17 KB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(17)) + packer.flush()


def with_usage(usage: Any) -> Any:
    return Response(json.dumps(completion("x") | {"usage": usage}), media_type="application/json")


ALIEN = "does not respond like an OpenAI-compatible endpoint"
JSON = {"media_type": "application/json"}


@pytest.mark.parametrize(
    ("instead", "cause"),
    [
        (lambda: Response("{no json", **JSON), ALIEN),
        (lambda: Response(b"\xff\xfe\xff", **JSON), ALIEN),
        (lambda: Response("[" * 200_000, **JSON), ALIEN),
        (lambda: Response("[]", **JSON), ALIEN),
        (lambda: Response(status_code=307, headers={"location": "http://[::1"}), ALIEN),
        (lambda: Response('{"choices": {"a": 1}}', **JSON), ALIEN),
        (lambda: with_usage({"completion_tokens": "many"}), ALIEN),
        (lambda: with_usage({"completion_tokens": float("nan")}), ALIEN),
        (lambda: with_usage({"completion_tokens": -1}), ALIEN),
        (lambda: with_usage({"completion_tokens": [1]}), ALIEN),
        (lambda: with_usage("all"), ALIEN),
        (lambda: error(422, "", "x" * 9999), f"returned an error: {'x' * 300}"),
        (lambda: error(422, "", {"a": ["b"]}), "returned an error: {'a': ['b']}"),  # type: ignore[arg-type]
        (lambda: StreamingResponse(_slowly()), "does not complete a response within 0.3 s"),
        (lambda: StreamingResponse(_zeros(), **JSON), "sends a response of more than 16,777,216"),
        (
            lambda: Response(_bomb(), headers={"content-encoding": "gzip"}, **JSON),
            "sends a response of more than 16,777,216 bytes",
        ),
        (
            lambda: Response(b"x", headers={"content-encoding": "zstd"}, **JSON),
            "compresses its responses by 'zstd'",
        ),
    ],
)
def test_a_response_that_is_wrong_huge_or_endless_ends_in_one_line(
    endpoint: Endpoint, tmp_path: Path, instead: Any, cause: str
) -> None:
    endpoint.instead = lambda text: instead()
    slow = cause.endswith("0.3 s")
    spec = EndpointSpec(endpoint=endpoint.url, model="tiny-chat", timeout=0.3 if slow else 60)
    unread = b"usage" in getattr(instead(), "body", b"")  # which a judge does not read
    for ask_it, why in (
        (
            lambda: respond(ASKED[:1], EndpointAnswers(spec, SETTINGS), tmp_path / "r", Silent()),
            cause,
        ),
        (lambda: list(WinRate(judge=spec)(JUDGED)), "gives a verdict in 0 of" if unread else cause),
    ):
        with pytest.raises(UserError) as raised:
            ask_it()
        assert why in raised.value.cause
        assert "\n" not in raised.value.cause + raised.value.cure


def test_requests_that_hang_do_not_delay_the_end(endpoint: Endpoint) -> None:
    endpoint.instead = lambda text: StreamingResponse(_slowly())
    client = EndpointClient(EndpointSpec(endpoint=endpoint.url, model="tiny-chat"), 2**20)
    loop, connection = RequestLoop(1), client.connect()
    said: Any = {"model": "tiny-chat", "messages": [{"role": "user", "content": "why"}]}
    send = partial(connection.chat.completions.create, **said)
    pending = loop.submit(lambda: client.answer(connection, send, str))
    while not endpoint.asked:
        time.sleep(0.01)
    loop.close(connection)
    assert pending.cancelled()
    assert connection.is_closed()


def test_a_redirect_carries_no_conversation_to_another_server(
    endpoint: Endpoint, folder: Path, tmp_path: Path
) -> None:
    with served(Endpoint(endpoint.model)) as other:
        place = f"{other.url}/chat/completions"
        endpoint.instead = lambda text: RedirectResponse(place, 307)
        wrong = complaint(endpoint.url, tmp_path)
        assert wrong.cause.endswith("redirects to another server: http://127.0.0.1")
        with pytest.raises(UserError, match="redirects to another server"):
            list(WinRate(judge=EndpointSpec(endpoint=endpoint.url, model="tiny-chat"))(JUDGED))
        assert other.asked == []
    here = iter([RedirectResponse(f"{endpoint.url}/chat/completions?again", 307)])
    endpoint.instead = lambda text: next(here, None)
    assert len(answered(endpoint.url, tmp_path, ASKED[:1]).conversations) == 1
