"""Batched generation, token by token, in which a finished row leaves the batch.

The loop of transformers computes padding for each finished row until the last row ends. Here the
batch and its keys and values shrink instead.

A model is called with transformers' cache, so that any causal model can be read, with the weights
that it has at that moment; an `Engine` runs the models that it accepts faster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdcore.data.responses.growing_layer import growing_cache, keeps_keys
from kdcore.decoding.engines.protocols import Engine
from kdcore.decoding.sampling import Sampling, draw
from kdcore.decoding.session import Session
from kdcore.models.anatomy import short_length_of
from kdcore.models.device import sent
from kdcore.models.facts import not_finite
from kdcore.models.probes import running
from kdcore.models.transformers_versions import cache_argument

Choose: TypeAlias = Callable[[list[Tensor]], Tensor]
"""A function from the logits [R, V] of each model to the next tokens [R] of R rows."""


@torch.inference_mode()
def continue_prompts(
    prompts: Sequence[Sequence[int]],
    models: Sequence[Any],
    choose: Choose,
    *,
    ends: Sequence[int],
    limits: Sequence[int],
    engine: Engine | None = None,
) -> list[list[int]]:
    """Continue prompts until each row ends.

    Args:
        prompts: Token ids of the prompts.
        models: Causal language models in eval mode, which all read the chosen tokens.
        choose: The choice of the next tokens.
        ends: Token ids that end a row.
        limits: Maximum number of new tokens of each row, at least 1.
        engine: An engine that is bound to the only model, and runs it in place of its ``forward``.

    Returns:
        The new tokens of each prompt, up to and including the first end token.

    Raises:
        UserError: A model gives NaN or infinite logits.
    """
    device = models[0].device
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    padded = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    tokens = torch.tensor(padded, device=device)
    real = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    rows = [*range(len(prompts))]
    readers: list[_Reader | _EngineReader] = [_Reader(model) for model in models]
    if engine is not None:
        readers = [_EngineReader(models[0], engine, longest + max(limits))]
    made: list[list[int]] = [[] for _ in prompts]
    while True:
        logits = [reader(tokens, real) for reader in readers]
        chosen = choose(logits)
        best = torch.stack([each.amax(-1) for each in logits])  # NaN if any logit is
        # all that the host has to know of a token, in one copy: each one waits for the device
        known = torch.stack([chosen, best.isfinite().all(0)], dim=1).tolist()
        for row, (token, finite) in zip(rows, known, strict=True):
            if not finite:
                faulty = int(best.isfinite().all(1).int().argmin())
                raise not_finite(type(models[faulty]).__name__)
            made[row].append(token)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        real = torch.cat([real, real.new_ones(len(rows), 1)], 1)
        going = [
            place
            for place, row in enumerate(rows)
            if len(made[row]) < limits[row] and made[row][-1] not in ends
        ]
        if not going:
            return made
        if len(going) < len(rows):
            left = sent(torch.tensor(going), device)
            for reader in readers:
                reader.select(left)
            rows, tokens, real = [rows[place] for place in going], tokens[left], real[left]


def pick(
    logits: Tensor, temperature: float, generator: torch.Generator | None, top_p: float = 1.0
) -> Tensor:
    """Choose the next tokens: greedily at temperature 0, otherwise by sampling.

    Args:
        logits: [R, V] logits.
        temperature: Sampling temperature.
        generator: Generator on the device of the logits (default: torch's own).
        top_p: Nucleus sampling threshold; 1 means all tokens.

    Returns:
        [R] token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = Sampling(temperature, top_p=top_p).warped(logits.float())
    return draw(scores.softmax(-1), generator)


class _Reader:
    """A model with its cache of R rows, the rows of the last call or of its last reordering."""

    def __init__(self, model: Any) -> None:
        self._model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = inspect.signature(plain.forward).parameters
        self._cache_argument = cache_argument(plain)
        self._config, self._short = plain.config, short_length_of(plain)
        self.cache, self._read, self._long = growing_cache(self._config), 0, False
        self._caches = self._cache_argument in self._takes and keeps_keys(self.cache)

    def __call__(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The logits [R, V] after all tokens [R, T] so far, of which ``real`` [R, T] is the mask.

        It runs the new tokens only. When LongRoPE changes its factors, because a row grew or a long
        one left, it runs all tokens again, as transformers does.
        """
        asking, there = tokens.device, self._model.device
        tokens, real = tokens.to(there), real.to(there)
        if not self._caches:
            return self._without_cache(tokens, real).to(asking)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if self._short is not None and (positions.max() >= self._short).item() != self._long:
            self._forget(long=not self._long)
        new = slice(self._read, None)
        self._read = tokens.shape[1]
        asked = {"attention_mask": real, "position_ids": positions[:, new], "logits_to_keep": 1}
        taken = {name: value for name, value in asked.items() if name in self._takes}
        taken |= {self._cache_argument: self.cache, "use_cache": True}
        with running(self._model):
            output = self._model(input_ids=tokens[:, new], **taken)
        logits: Tensor = output.logits[:, -1]
        return logits.to(asking)

    def select(self, rows: Any) -> None:
        """Keep the rows [R] in the cache."""
        self.cache.reorder_cache(rows)

    def _without_cache(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The logits [R, V] of a model that keeps no keys and values: all tokens are read again.

        Padded on the right, since some of these models (RWKV) ignore the mask too.
        """
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        places, sizes = torch.arange(tokens.shape[1], device=tokens.device), real.sum(1)
        moved = (places - sizes[:, None]) % tokens.shape[1]
        asked = {"attention_mask": real[rows, moved], "use_cache": False}
        taken = {name: value for name, value in asked.items() if name in self._takes}
        with running(self._model):
            logits: Tensor = self._model(input_ids=tokens[rows, moved], **taken).logits
        return logits[rows[:, 0], sizes - 1]

    def _forget(self, *, long: bool) -> None:
        """Empty the cache, for LongRoPE's long factors or its short ones."""
        self.cache, self._read, self._long = growing_cache(self._config), 0, long


class _EngineReader:
    """A model that an engine runs, with a session of the rows that are not done.

    length: Length of the longest row at its end.
    """

    def __init__(self, model: Any, engine: Engine, length: int) -> None:
        self._session, self._length, self._started = Session(model, (), engine), length, False

    def __call__(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The logits [R, V] after all tokens [R, T] so far, of which ``real`` [R, T] is the mask.

        It runs the new tokens only; at first the prompts without their last tokens, so that the
        head reads one token of each row.
        """
        session = self._session
        with session.serving():
            if not self._started:
                self._started = True
                session.start(len(tokens), self._length)
                right = tokens.gather(1, torch.argsort(real == 0, dim=1, stable=True))
                if tokens.shape[1] > 1:
                    session.read(right[:, :-1], real.sum(1) - 1)
            logits, _ = session.extend(tokens[:, -1:], torch.ones_like(tokens[:, 0]))
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep the rows [R] in the cache."""
        self._session.select(rows)
