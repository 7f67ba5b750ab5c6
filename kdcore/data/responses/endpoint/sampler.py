"""A vLLM server that samples the student's responses, with weights that the training sends.

A student with adapters sends those: the server loads them beside its model under a new name each
time, since it keeps the keys and values of prompts by that name. A whole student is written to a
folder, from which the server reloads its weights; then the server forgets those keys and values.
No request of the training is pending meanwhile.

After the first of these, the log-probs of some greedy responses are compared with the student's:
nothing else shows that the server runs the same model.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.data.ranks import Ranks
from kdcore.data.responses.endpoint.client import EndpointClient, RequestLoop
from kdcore.data.responses.endpoint.tokens import continuation, tokens_of
from kdcore.errors import UserError, counted
from kdcore.specs.parts.on_policy import OnPolicySpec, SamplerSpec

MOST_BYTES = 2**26
"""Size of a response: an answer with its token ids."""
_PROMPTS, _TOKENS = 4, 16
"""Prompts, and tokens after each of them, whose log-probs are compared with the student's."""
_SAME = 0.15
"""Mean difference of these log-probs in nats that another dtype explains. For SmolLM2-135M bfloat16
makes 0.03, noise of 3 % of the weights 0.2, and a layer that is left out 0.4; the first token alone
shows neither: it differs by 0.16, 0.14 and 0.9."""
_IDLE = 10.0
"""Seconds in which a server without other users has released its keys and values."""

_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and the options --enable-lora --max-lora-rank R"
_WHOLE = "VLLM_SERVER_DEV_MODE=1"


class ServedSampler:
    """A server that continues prompts with the student's weights.

    Args:
        spec: The settings of the policy, with its server.
        folder: Folder for the weights, if the server does not have one of its own.
        classes: Number V of classes that student and teacher share.
        every: Whether the student has no further classes.
        plain: Function from the student's state to that without modules of the training.
        ranks: The processes of the training; the first one sends the weights.

    Raises:
        UserError: The client library is not installed, or the environment variable with the key is
            not set.
    """

    def __init__(
        self,
        spec: OnPolicySpec,
        folder: Path,
        classes: int,
        *,
        every: bool,
        plain: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        ranks: Ranks,
    ) -> None:
        assert spec.sampler is not None
        self.spec: SamplerSpec = spec.sampler
        self._policy, self._classes, self._plain, self._ranks = spec, classes, plain, ranks
        self._allowed = {} if every else {"allowed_token_ids": list(range(classes))}
        self._folder = (self.spec.folder or folder).resolve()
        self._endpoint = EndpointClient(self.spec, MOST_BYTES)
        self._client = self._endpoint.connect()
        self._loop = RequestLoop(spec.batch_size)
        self._kept: list[Path] = []
        self._model, self._step = self.spec.model, -1

    def responses(
        self,
        student: Any,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: Sequence[int],
        *,
        step: int,
        generator: torch.Generator,
    ) -> list[list[int]]:
        """Sample responses, with the student's weights or earlier ones within the bound.

        Args:
            student: The student in eval mode.
            prompts: Token ids of the prompts.
            limits: Maximum number of new tokens of each response.
            ends: Token ids that end a response.
            step: Number of the optimizer step.
            generator: Generator of the seeds.

        Returns:
            The new tokens of each prompt, up to and including the first end token.

        Raises:
            UserError: The server cannot be reached, does not take the weights, or runs another
                model.
        """

        def current() -> tuple[str, int]:
            """The model to request, and the step of its weights."""
            if (first := not self._kept) or step - self._step > self.spec.staleness:
                self._send(student, step)
                if first:
                    self._refuse_other_model(student, prompts, limits, ends)
            return self._model, self._step

        self._model, self._step = self._ranks.by_main(current)
        count = len(prompts)
        seeds = torch.randint(2**31, (count,), generator=generator, device=generator.device)
        pending = [
            self._loop.submit(partial(self._response, prompt, most, ends, seed))
            for prompt, most, seed in zip(prompts, limits, seeds.tolist(), strict=True)
        ]
        return [each.result() for each in pending]

    def lag(self, step: int) -> int:
        """The number of optimizer steps by which the server's weights are older.

        Args:
            step: Number of the optimizer step of the last responses.

        Returns:
            That number in the first process, and 0 in the others, so that their sum counts it once.
        """
        return step - self._step if self._ranks.number == 0 else 0

    def close(self) -> None:
        """Remove what was sent, as far as the server still answers, and end the connection."""
        for folder in self._kept:
            with suppress(UserError, TimeoutError):
                self._unload(folder, _IDLE)
            shutil.rmtree(folder, ignore_errors=True)
        if self.spec.folder is None and self._kept:
            with suppress(OSError):
                self._folder.rmdir()
        self._loop.close(self._client)

    def _send(self, student: Any, step: int) -> None:
        """Give the server the student's weights. Only the first process does so."""
        if not self._kept and self.spec.folder is None:
            self._forget_killed()
        folder = self._folder / f"step-{step}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        self._kept.append(folder)
        if _adapted(student):
            student.save_pretrained(folder)
            loaded = {"lora_name": folder.name, "lora_path": str(folder)}
            self._post(f"{self._api}/load_lora_adapter", loaded, _ADAPTERS)
            self._model = folder.name
        else:
            student.save_pretrained(folder, state_dict=self._plain(student.state_dict()))
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post(f"{self._root}/collective_rpc", call, _WHOLE)
            self._forget_prompts()
        self._step = step
        for before in self._kept[:-1]:
            self._unload(before)
            shutil.rmtree(before)
        self._kept = [folder]

    def _forget_killed(self) -> None:
        """Remove what a killed process of this run sent last."""
        for folder in self._folder.glob("step-*"):
            with suppress(UserError, TimeoutError):  # the server may be another one now
                self._unload(folder, _IDLE)
            shutil.rmtree(folder, ignore_errors=True)

    def _unload(self, folder: Path, seconds: float | None = None) -> None:
        """Unload adapters that the server does not need any longer."""
        if (folder / "adapter_config.json").exists():
            url, asked = f"{self._api}/unload_lora_adapter", {"lora_name": folder.name}
            self._post(url, asked, _ADAPTERS, seconds=seconds)

    def _forget_prompts(self) -> None:
        """Let the server forget the keys and values that its former weights made."""
        until = time.monotonic() + _IDLE
        url = f"{self._root}/reset_prefix_cache"
        while not self._post(url, {}, _WHOLE, lambda text: bool(json.loads(text)["success"])):
            if time.monotonic() > until:
                raise UserError(
                    f"{self.spec.endpoint} answers other requests, so its weights cannot be "
                    "replaced",
                    "use a server that nobody else uses",
                )
            time.sleep(0.1)

    def _refuse_other_model(
        self,
        student: Any,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Compare log-probs. Raises UserError when the server's differ from the student's."""
        some = zip(prompts[:_PROMPTS], limits, strict=False)
        gaps = [gap for each in some for gap in self._gaps(student, *each, ends)]
        mean = sum(gaps) / max(1, len(gaps))
        if not mean <= _SAME:
            raise UserError(
                f"{self.spec.endpoint} runs another model than the student: the log-probs of "
                f"{counted(len(gaps), 'greedy token')} differ by {mean:.2f} nats on average",
                "serve the model of student.model",
            )

    def _gaps(
        self, student: Any, prompt: Sequence[int], limit: int, ends: Sequence[int]
    ) -> list[float]:
        """The differences of log-probs at the tokens of the server's greedy response."""
        most = min(limit, _TOKENS)
        asked = continuation(self._model, prompt, most=most, ends=ends, temperature=0.0, seed=0)
        found = self._wait(
            lambda: self._client.completions.create(**asked, logprobs=1), _tokens_and_logprobs
        )
        if found is None:
            raise self._without_ids()
        tokens, theirs = found
        if not all(0 <= token < student.config.get_text_config().vocab_size for token in tokens):
            return [torch.inf]
        ids = torch.tensor([[*prompt, *tokens]], device=student.device)
        with torch.no_grad():
            logits = student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        ours = logp.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()
        return [abs(one - other) for one, other in zip(ours, theirs, strict=False)]

    async def _response(
        self, prompt: Sequence[int], most: int, ends: Sequence[int], seed: int
    ) -> list[int]:
        asked = continuation(
            self._model,
            prompt,
            most=most,
            ends=ends,
            temperature=self._policy.temperature,
            top_p=self._policy.top_p,
            seed=seed,
            **self._allowed,
        )
        found = await self._endpoint.answer(
            self._client, lambda: self._client.completions.create(**asked), tokens_of
        )
        tokens = found[0] if found else None
        if tokens is None:
            raise self._without_ids()
        if not 0 < len(tokens) <= most or not all(0 <= each < self._classes for each in tokens):
            raise self._endpoint.alien()
        return tokens

    def _post(
        self,
        url: str,
        body: dict[str, Any],
        setting: str,
        read: Callable[[str], bool] = lambda text: True,
        seconds: float | None = None,
    ) -> bool:
        """Send a command. Raises UserError with the setting of the server that it needs."""

        def absent(fault: Any) -> bool:
            status: int | None = getattr(fault, "status_code", None)
            if status not in (None, 401, 403, 404):
                why = self._endpoint.reason(fault)
                raise UserError(
                    f"{self.spec.endpoint} does not take the student's weights: {why}",
                    f"check the server's log; the server needs {setting}",
                )
            return status == 404

        found: bool | None = self._wait(
            lambda: self._client.post(url, cast_to=str, body=body), read, absent, seconds
        )
        if found is None:
            raise UserError(
                f"{url} does not exist, so the server cannot take the student's weights",
                f"start vLLM's server with {setting}",
            )
        return found

    def _wait(
        self,
        send: Callable[[], Awaitable[Any]],
        read: Callable[[Any], Any],
        refused: Callable[[Any], bool] = lambda fault: False,
        seconds: float | None = None,
    ) -> Any:
        """Wait for one request, at most for some seconds. Raises TimeoutError after them."""

        async def asked() -> Any:
            return await self._endpoint.answer(self._client, send, read, refused)

        return self._loop.submit(asked).result(seconds)

    def _without_ids(self) -> UserError:
        return UserError(
            f"{self.spec.endpoint} does not return token ids",
            "use a server with return_token_ids, such as vLLM",
        )

    @property
    def _api(self) -> str:
        return self.spec.endpoint.rstrip("/")

    @property
    def _root(self) -> str:
        return self._api.removesuffix("/v1")


def _tokens_and_logprobs(completion: Any) -> tuple[list[int], list[float]] | None:
    """The tokens of a response and their log-probs; None if the server does not return ids."""
    tokens, _ = tokens_of(completion)
    if tokens is None:
        return None
    return tokens, [float(each) for each in completion.choices[0].logprobs.token_logprobs]


def _adapted(student: Any) -> bool:
    """Whether only adapters of a student are trained."""
    return hasattr(student, "merge_and_unload")
