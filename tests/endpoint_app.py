"""An OpenAI-compatible endpoint over a tiny model, which can be told to misbehave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.model import generate
from kdcore.data.template_mask import prompt_ids
from kdcore.models.facts import end_ids
from kdcore.models.loaded import LoadedModel
from kdcore.specs.training import GenerationSpec

KEY = "sk-tiny-secret"


@dataclass
class Endpoint:
    """A running server. asked: the bodies of the requests; headers: theirs.

    most: requests under way at once. tokens: generated in all.
    instead: what it does in the place of answering, given the text of the last turn; None answers.
    forge: what it says in the place of the best log-probs at a position.
    """

    model: LoadedModel
    wants_key: bool = False
    pause: float = 0.0
    instead: Callable[[str], Any] = lambda text: None
    most_logprobs: int = 64
    forge: Callable[[dict[str, float]], Any] = lambda best: best
    tokens_as_text: bool = False
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    tokens: int = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            facts = {"object": "model", "created": 0, "owned_by": "tests"}
            return {"object": "list", "data": [{"id": "tiny-chat"} | facts]}

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            self.headers.append(dict(request.headers))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(self.pause)
            self.under_way -= 1
            if self.wants_key and request.headers.get("authorization") != f"Bearer {KEY}":
                return error(401, "invalid_api_key", f"wrong: {request.headers['authorization']}")
            if body["model"] != "tiny-chat":
                return error(404, "model_not_found", "no such model")
            other = self.instead(body["messages"][-1]["content"])
            return self._answer(body) if other is None else other

        @app.post("/v1/completions")
        async def score(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            other = self.instead("")
            return self._scored(body) if other is None else other

        return app

    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM: the prompt's tokens, each with the likeliest that could have stood there."""
        assert body["echo"] and body["return_tokens_as_token_ids"]
        ids = torch.tensor(body["prompt"])
        with torch.no_grad():
            logp = self.model.model(ids[None]).logits[0].log_softmax(-1)
        best: list[Any] = [None]
        for place, token in enumerate([*ids[1:].tolist(), 0]):
            top = logp[place].topk(min(body["logprobs"], self.most_logprobs)).indices.tolist()
            found = {f"token_id:{i}": float(logp[place, i]) for i in {*top, token}}
            best.append(self.forge(found))
        tokens = [f"token_id:{i}" for i in (*ids.tolist(), 0)]
        if self.tokens_as_text:
            tokens = [self.model.tokenizer.decode(i) for i in (*ids.tolist(), 0)]
        scored = {"tokens": tokens, "top_logprobs": best, "token_logprobs": [], "text_offset": []}
        choice = {"index": 0, "finish_reason": "length", "text": "", "logprobs": scored}
        facts = {"id": "c", "object": "text_completion", "created": 0, "model": "tiny-chat"}
        return facts | {"choices": [choice]}

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        turns = tuple(Message(m["role"], m["content"]) for m in body["messages"])
        prompt = prompt_ids(Conversation("", turns), self.model.tokenizer)
        spec = GenerationSpec(max_new_tokens=body["max_tokens"], temperature=body["temperature"])
        (ids,) = generate([prompt], self.model, spec)
        self.tokens += len(ids)
        text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        return completion(text, "stop" if ids[-1] in end_ids(self.model) else "length", len(ids))


def completion(text: Any, reason: str = "stop", tokens: int = 1) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny-chat",
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
    }


def error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status)


def page() -> HTMLResponse:
    return HTMLResponse("<html>It works!</html>")


@contextmanager
def served(endpoint: Endpoint) -> Iterator[Endpoint]:
    """On a free port of this machine, until the block ends."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        endpoint.url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        config = uvicorn.Config(endpoint.app(), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.should_exit = True
            thread.join(timeout=10)
