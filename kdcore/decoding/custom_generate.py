"""Speculative decoding inside transformers' own ``generate``.

::

    model = AutoModelForCausalLM.from_pretrained("path/to/model")
    model.generate(**inputs, custom_generate=speculative(Path("runs/drafter/drafter")))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdcore.assembly import Assembly
from kdcore.choice import Choice
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.sampling import Sampling
from kdcore.drafter_files import load_drafter
from kdcore.errors import UserError
from kdcore.hookspecs import NoParams
from kdcore.models import already_loaded
from kdcore.protocols import Drafter, Verifier
from kdcore.registry import Registry, installed

KNOWN = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
"""What may shape the logits; `Sampling` does the same, in the same order."""


def speculative(
    drafter: Drafter | Path | str,
    *,
    verifier: Verifier | None = None,
    streamer: Any = None,
    registry: Registry | None = None,
) -> Callable[..., Tensor]:
    """What ``generate(custom_generate=...)`` takes.

    drafter: one that is bound to the model, or the folder of a trained one, which is then loaded
        for the model at its first call.
    verifier: by default greedy, or where ``do_sample`` is set the one that samples; both lossless.
    streamer: one of transformers', given here since generate hands its own to no callable.

    What comes back is what generate gives: the prompts and the new tokens [B, T], padded. Raises
    UserError for settings that would not be followed, such as beams or scores in the output.
    """

    @lru_cache(maxsize=1)
    def bound(model: PreTrainedModel) -> Drafter:
        if not isinstance(drafter, Path | str):
            return drafter
        return load_drafter(Path(drafter), already_loaded(model), registry or installed())

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Tensor:
        config: Any = generation_config
        _refuse(config, logits_processor, rest)
        drawn = bool(config.do_sample)
        chosen = verifier or _verifier("sampling" if drawn else "greedy", registry or installed())
        sampling = Sampling(
            temperature=(config.temperature or 1.0) if drawn else 0.0,
            top_k=(config.top_k or 0) if drawn else 0,
            top_p=(config.top_p or 1.0) if drawn else 1.0,
            repetition_penalty=config.repetition_penalty or 1.0,
        )
        decoder = Decoder(model, bound(model), chosen, sampling)
        stop = _stop(stopping_criteria, input_ids.shape[1])
        real = rest.get("attention_mask")
        real = torch.ones_like(input_ids) if real is None else real
        if streamer is not None:
            streamer.put(input_ids.cpu())
        rows: list[list[int]] = [[] for _ in input_ids]
        for emitted in decoder.stream(input_ids, real, stop):
            for row, tokens in zip(rows, emitted, strict=True):
                row += tokens
            if streamer is not None:
                for token in emitted[0]:
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, _padded(rows, config, input_ids)], dim=1)

    return generate


def _refuse(config: Any, processors: LogitsProcessorList, rest: dict[str, Any]) -> None:
    unknown = [type(each).__name__ for each in processors if not isinstance(each, KNOWN)]
    asked = {
        f"logits processors ({', '.join(unknown)})": bool(unknown),
        f"num_beams={config.num_beams}": (config.num_beams or 1) > 1,
        "return_dict_in_generate": bool(config.return_dict_in_generate),
        "assistant_model": rest.get("assistant_model") is not None,
        "inputs_embeds": rest.get("inputs_embeds") is not None,
    }
    for what, wanted in asked.items():
        if wanted:
            raise UserError(
                f"speculative decoding does not follow {what}",
                "leave it out, or generate without custom_generate",
            )


def _stop(criteria: StoppingCriteriaList, prompt: int) -> Stop:
    """The criteria as `Stop` takes them: length and end tokens apart from the others."""
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    ends = [t for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.tolist()]
    others = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    if not lengths:
        raise UserError("nothing limits the length of the answer", "set max_new_tokens")
    return Stop(
        min(lengths) - prompt, tuple(ends), StoppingCriteriaList(others) if others else None
    )


def _padded(rows: list[list[int]], config: Any, like: Tensor) -> Tensor:
    """[B, longest] the new tokens, finished rows filled as generate fills them."""
    pad = config.pad_token_id
    width = max(map(len, rows))
    filled = [row + [0 if pad is None else int(pad)] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=like.dtype, device=like.device).view(len(rows), width)


def _verifier(name: str, registry: Registry) -> Verifier:
    verifier: Verifier = Assembly(registry).build(Choice("verifier", name, NoParams()))
    return verifier
