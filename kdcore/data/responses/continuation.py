"""Prompts continued a token at a time, all of them at once; a row that has ended leaves the batch.

Where rows end at different lengths, `transformers`' own loop computes padding for every row that
has ended until the last one has. Here the batch and its keys and values shrink instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdcore.data.responses.growing_layer import growing_cache
from kdcore.decoding.sampling import Sampling, draw
from kdcore.models.anatomy import short_length_of

Choose: TypeAlias = Callable[[list[Tensor]], Tensor]
"""From the logits [R, V] of each model, after R rows, to the rows' next tokens [R]."""


@torch.inference_mode()
def continue_prompts(
    prompts: Sequence[Sequence[int]],
    models: Sequence[Any],
    choose: Choose,
    *,
    ends: Sequence[int],
    limits: Sequence[int],
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with its first end token.

    models: causal language models in eval mode, all of which read what is chosen. ends: token ids
    that end a row. limits: how many tokens each row gets at most, at least 1.
    """
    device = models[0].device
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    padded = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    tokens = torch.tensor(padded, device=device)
    real = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    left, stops = torch.tensor(limits, device=device), torch.tensor(ends, device=device)
    rows = torch.arange(len(prompts), device=device)
    readers = [_Reader(model) for model in models]
    made: list[list[int]] = [[] for _ in prompts]
    while True:
        chosen = choose([reader(tokens, real) for reader in readers])
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            made[row].append(token)
        going: Any = ((left > 1) & ~torch.isin(chosen, stops)).nonzero()[:, 0]
        if not len(going):
            return made
        if len(going) < len(chosen):
            for reader in readers:
                reader.cache.reorder_cache(going)
        rows, left = rows[going], left[going] - 1
        tokens = torch.cat([tokens[going], chosen[going, None]], 1)
        real = torch.cat([real[going], real.new_ones(len(going), 1)], 1)


def pick(
    logits: Tensor, temperature: float, generator: torch.Generator | None, top_p: float = 1.0
) -> Tensor:
    """Tokens [R] for logits [R, V]: the likeliest at temperature 0, else drawn.

    Drawn from the softmax at that temperature, of the fewest classes that reach top_p of it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = Sampling(temperature, top_p=top_p).warped(logits.float())
    return draw(scores.softmax(-1), generator)


class _Reader:
    """A model and what it has read: R rows, as many as the last call had or was reordered to."""

    def __init__(self, model: Any) -> None:
        self._model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = inspect.signature(plain.forward).parameters
        self._config, self._short = plain.config, short_length_of(plain)
        self.cache, self._read, self._long = growing_cache(self._config), 0, False

    def __call__(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The logits [R, V] after tokens [R, T], all so far; real: [R, T].

        It reads what it has not read yet. Where LongRoPE changes its factors, because a row grew
        or a long one left, it reads all anew, as `transformers` does.
        """
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if self._short is not None and (positions.max() >= self._short).item() != self._long:
            self._forget(long=not self._long)
        new = slice(self._read, None)
        self._read = tokens.shape[1]
        asked = {"attention_mask": real, "position_ids": positions[:, new], "logits_to_keep": 1}
        taken = {name: value for name, value in asked.items() if name in self._takes}
        output = self._model(
            input_ids=tokens[:, new], past_key_values=self.cache, use_cache=True, **taken
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _forget(self, *, long: bool) -> None:
        """Begin anew, with LongRoPE's long factors or its short ones."""
        self.cache, self._read, self._long = growing_cache(self._config), 0, long
