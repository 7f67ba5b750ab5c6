"""Speculative decoding inside the ``generate`` method of transformers.

For example:

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
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from kdcore.decoding.build import lossless_verifier
from kdcore.decoding.drafters.files import load_drafter
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.sampling import Processed
from kdcore.errors import UserError
from kdcore.method.protocols import Drafter, Verifier
from kdcore.method.registry import Registry, installed
from kdcore.models.loading import already_loaded

FOLLOWED = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Supported logits processors: those that do not depend on a token's position in the row."""
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
ROW_BY_ROW = (StopStringCriteria, MaxTimeCriteria)
"""Stopping criteria that do not depend on the padding before a prompt."""


def speculative(
    drafter: Drafter | Path | str,
    *,
    verifier: Verifier | None = None,
    streamer: Any = None,
    registry: Registry | None = None,
) -> Callable[..., Tensor]:
    """A function for ``generate(custom_generate=...)``.

    The function returns the prompts and the new tokens, [B, T], padded like the result of
    ``generate``. It raises UserError for unsupported settings, such as beams or scores in the
    output. ``generate`` does not pass on ``streamer``, ``assistant_model`` and the tokenizer of
    ``stop_strings``: give the streamer here, and a `StopStringCriteria` among the criteria.

    Args:
        drafter: A drafter that is bound to the model, or the folder of a trained drafter, which is
            loaded at the first call.
        verifier: The verifier (default: the lossless one, greedy or sampling by ``do_sample``).
        streamer: A streamer of transformers.
        registry: The registry in which components are found (default: what is installed).

    Returns:
        The function.
    """

    @lru_cache(maxsize=1)
    def bound(model: PreTrainedModel) -> Drafter:
        if not isinstance(drafter, Path | str):
            return drafter
        known = registry or installed()
        return load_drafter(Path(drafter), already_loaded(model), known, dtype=model.dtype)

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Tensor:
        config: Any = generation_config
        given = rest.get("attention_mask")
        real = torch.ones_like(input_ids) if given is None else given
        _refuse(model, config, real, rest)
        drawn = bool(config.do_sample)
        chosen = verifier or lossless_verifier(registry or installed(), greedy=not drawn)
        shaping = Processed(_followed(logits_processor, real), greedy=not drawn)
        decoder = Decoder(model, bound(model), chosen, shaping)
        stop = _stop(stopping_criteria, real)
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


def _refuse(model: PreTrainedModel, config: Any, real: Tensor, rest: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    cache, positions = rest.get("past_key_values"), rest.get("position_ids")
    own = (real.cumsum(1) - 1).clamp(min=0)
    tensors = [name for name, value in rest.items() if isinstance(value, Tensor)]
    unread = sorted({*tensors} - {"attention_mask", "position_ids"})
    asked = {
        f"an encoder-decoder model ({type(model).__name__})": model.config.is_encoder_decoder,
        mode.value.replace("_", " "): mode not in MODES,
        "return_dict_in_generate": bool(config.return_dict_in_generate),
        "a quantized cache": config.cache_implementation == "quantized",
        "filled past_key_values": cache is not None and cache.get_seq_length() > 0,
        "custom position_ids": positions is not None
        and not torch.equal(positions * real, own * real),
        f"additional inputs ({', '.join(unread)})": bool(unread),
    }
    for what, wanted in asked.items():
        if wanted:
            raise _unfollowed(what)


def _unfollowed(what: str) -> UserError:
    return UserError(
        f"speculative decoding does not support {what}",
        "remove it, or generate without custom_generate",
    )


def _followed(given: LogitsProcessorList, real: Tensor) -> LogitsProcessorList:
    """The given processors, for rows without their padding."""
    unknown = [type(each).__name__ for each in given if type(each) not in FOLLOWED]
    if unknown:
        raise _unfollowed(f"logits processors ({', '.join(unknown)})")
    followed = LogitsProcessorList()
    for each in given:
        if isinstance(each, RepetitionPenaltyLogitsProcessor):
            padding = (real != 0).int().argmax(1)
            ignored = 0 if each.prompt_ignore_length is None else each.prompt_ignore_length
            if (torch.as_tensor(ignored, device=real.device) != padding).any():
                raise _unfollowed(
                    "a repetition penalty that ignores the prompt or includes padding"
                )
            each = RepetitionPenaltyLogitsProcessor(each.penalty)
        followed.append(each)
    return followed


def _stop(criteria: StoppingCriteriaList, real: Tensor) -> Stop:
    """The `Stop` of the criteria, with length and end tokens apart from the others."""
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    ends = [t for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.tolist()]
    others = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    if not lengths:
        raise UserError("the length of the answer is unlimited", "set max_new_tokens")
    own = [type(c).__name__ for c in others if not isinstance(c, ROW_BY_ROW)]
    if own and not real.bool().all():
        raise UserError(
            f"the stopping criteria {', '.join(own)} would not see the padding that generate "
            "includes",
            "generate from prompts of equal length, or from one prompt at a time",
        )
    return Stop(
        min(lengths) - real.shape[1],
        tuple(ends),
        StoppingCriteriaList(others) if others else None,
    )


def _padded(rows: list[list[int]], config: Any, like: Tensor) -> Tensor:
    """[B, longest] new tokens, with finished rows padded as by generate."""
    pad = config._pad_token_tensor  # the end token if the config names no padding
    width = max(map(len, rows))
    filled = [row + [0 if pad is None else int(pad)] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=like.dtype, device=like.device).view(len(rows), width)
