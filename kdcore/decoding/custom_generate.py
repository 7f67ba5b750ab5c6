"""Speculative decoding inside the ``generate`` method of transformers.

For example:

    model = AutoModelForCausalLM.from_pretrained("path/to/model")
    model.generate(**inputs, custom_generate=speculative(Path("runs/drafter/drafter")))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry, installed
from kdcore.decoding.build import REFERENCE, lossless_verifier
from kdcore.decoding.drafters.fallback import FallbackDrafter
from kdcore.decoding.drafters.files import load_drafter, read_config
from kdcore.decoding.engines.protocols import Engine
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.processors import Processed, fault_of
from kdcore.decoding.protocols import Drafter, Verifier
from kdcore.decoding.tree import DraftTree, Verdict
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import already_loaded
from kdcore.models.transformers_versions import CACHES

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
ROW_BY_ROW = (StopStringCriteria, MaxTimeCriteria)
"""Stopping criteria that do not depend on the padding before a prompt."""

_TURN = threading.Lock()
_TURNS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
"""A lock for each model."""


def speculative(
    drafter: Drafter | Path | str,
    *,
    first: Drafter | str | None = None,
    verifier: Verifier | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: Sequence[str] = (),
    engine: str = REFERENCE,
    registry: Registry | None = None,
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A function for ``generate(custom_generate=...)``.

    The function returns the prompts and the new tokens, [B, T], padded like the result of
    ``generate``, or with ``return_dict_in_generate`` its record with ``sequences``, ``scores`` and
    ``logits``. It raises UserError for unsupported settings, such as beams, hidden states in the
    output, or logits processors that are not functions of the tokens before and the logits.
    ``generate`` does not pass on ``streamer``, ``assistant_model`` and ``tokenizer``: give the
    streamer here, and the tokenizer with the stop strings.

    Args:
        drafter: The folder of a trained drafter, or the name of a drafter with its default
            parameters, such as ``ngram``: both are bound to the model at the first call. Or a
            drafter that is bound already.
        first: A drafter that reads tokens alone and is asked first, bound or the name of one, such
            as ``suffix``; the other one drafts where it has nothing.
        verifier: The verifier (default: the lossless one, greedy or sampling by ``do_sample``).
        streamer: A streamer of transformers.
        tokenizer: The tokenizer of the stop strings.
        stop_strings: Strings that end a row.
        engine: Name of the engine, which is bound at the first call. ``torch`` reads the weights
            at each pass; ``openvino`` converts the model again after they changed.
        registry: The registry in which components are found (default: what is installed).

    Returns:
        The function. Threads that call it for one model take turns, since model and drafter keep
        the state of one call.

    Raises:
        UserError: There are stop strings without a tokenizer, ``drafter`` is neither a drafter nor
            the folder or the name of one, or ``first`` is another name.
    """
    if stop_strings and tokenizer is None:
        raise UserError("stop_strings require a tokenizer", "give it as tokenizer=")
    known = registry or installed()
    if isinstance(drafter, Path | str):  # before a service waits for its first request
        if _is_folder(drafter, known):
            read_config(Path(drafter))
        else:
            known.component("drafter", str(drafter))
    elif not hasattr(drafter, "propose"):
        raise UserError(
            f"a {type(drafter).__name__} is not a drafter",
            "give the folder drafter/ of a train-drafter run, the name of a drafter, or a drafter "
            "that load_drafter returned",
        )
    if isinstance(first, str):
        known.component("drafter", first)

    def bound_alone(given: Drafter | Path | str, model: PreTrainedModel) -> Drafter:
        if not isinstance(given, Path | str):
            return given
        if _is_folder(given, known):
            return load_drafter(Path(given), already_loaded(model), known, dtype=model.dtype)
        choice = Choice("drafter", str(given), known.component("drafter", str(given)).params())
        built: Drafter = Assembly(known, model.device).build(choice)
        built.bind(model, tokenizer)
        return built

    @lru_cache(maxsize=1)
    def bound(model: PreTrainedModel) -> Drafter:
        own = bound_alone(drafter, model)
        return own if first is None else FallbackDrafter(bound_alone(first, model), own)

    @lru_cache(maxsize=1)
    def bound_to(model: PreTrainedModel) -> Engine | None:
        if engine == REFERENCE:
            return None
        choice = Choice("engine", engine, known.component("engine", engine).params())
        built: Engine = Assembly(known).build(choice)
        built.bind(model, bound(model).layers)
        return built

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        config: Any = generation_config
        given = rest.get("attention_mask")
        real = torch.ones_like(input_ids) if given is None else given
        with ExitStack() as ended:
            if streamer is not None:
                ended.callback(streamer.end)  # after an error too: a reader waits for it
            ended.enter_context(_turn(model))
            _refuse(model, config, real, rest)
            if streamer is not None:
                if len(input_ids) > 1:  # whose tokens are not verified in step
                    raise _unfollowed(f"a streamer of {len(input_ids)} rows")
                streamer.put(input_ids.cpu())
            criteria = StoppingCriteriaList(stopping_criteria)
            if stop_strings:
                criteria.append(StopStringCriteria(tokenizer, [*stop_strings]))
            stop = _stop(criteria, real)
            classes = model.config.get_text_config().vocab_size
            _refuse_impure(logits_processor, input_ids, classes, stop.end)
            drawn = bool(config.do_sample)
            chosen = verifier or lossless_verifier(registry or installed(), greedy=not drawn)
            recorder = _Recorder(chosen) if config.return_dict_in_generate else None
            shaping = Processed(logits_processor, greedy=not drawn, prompt=input_ids)
            verifies = recorder or chosen
            decoder = Decoder(model, bound(model), verifies, shaping, bound_to(model))
            rows: list[list[int]] = [[] for _ in input_ids]
            for emitted in decoder.stream(input_ids, real, stop):
                for row, tokens in zip(rows, emitted, strict=True):
                    row += tokens
                if recorder is not None:
                    recorder.keep([len(tokens) for tokens in emitted])
                if streamer is not None:
                    for token in emitted[0]:
                        streamer.put(torch.tensor([token]))
        sequences = torch.cat([input_ids, _padded(rows, config, input_ids)], dim=1)
        return sequences if recorder is None else recorder.output(sequences, config)

    return generate


def _is_folder(drafter: Path | str, known: Registry) -> bool:
    """Whether it is the folder of a drafter, and not the name of one, which may be misspelt."""
    if isinstance(drafter, Path):
        return True
    return drafter not in known.names("drafter") and (
        Path(drafter).exists() or Path(drafter).name != drafter
    )


def _turn(model: PreTrainedModel) -> Any:
    """The lock of a model, whose forward hooks and drafter serve one call at a time."""
    with _TURN:
        return _TURNS.setdefault(model, threading.RLock())


class _Recorder:
    """A verifier that records the logits of the accepted tokens, before and after processing."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier, self.lossless = verifier, verifier.lossless
        self.greedy = getattr(verifier, "greedy", False)
        self.chain = getattr(verifier, "chain", False)
        self.kept: list[list[tuple[Tensor, Tensor]]] = []  # for each row, [n, V] twice

    def __call__(
        self, tree: DraftTree, logp: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> Verdict:
        self.shaped, self.verdict = cast(Any, logp), self.verifier(tree, logp, generator)
        return self.verdict

    def keep(self, counts: Sequence[int]) -> None:
        """Record the first ``counts`` tokens of each row of the last round."""
        self.kept = self.kept or [[] for _ in counts]
        path = self.verdict.path
        slots = torch.cat([path.new_zeros(len(path), 1), path + 1], dim=1)
        for row, count in enumerate(counts):
            if count:
                own = slots[row, :count]
                self.kept[row].append(self.shaped.scores(torch.full_like(own, row), own))

    def output(self, sequences: Tensor, config: Any) -> GenerateDecoderOnlyOutput:
        """The record of ``generate``; after the end of a row, its padding is certain."""
        by_row = [[torch.cat(parts) for parts in zip(*row, strict=True)] for row in self.kept]
        steps = max((len(logits) for logits, _ in by_row), default=0)

        def stacked(kind: int) -> tuple[Tensor, ...]:
            classes = by_row[0][kind].shape[1]
            certain = by_row[0][kind].new_full((classes,), -torch.inf)
            certain[0 if config._pad_token_tensor is None else int(config._pad_token_tensor)] = 0
            filled = [
                torch.cat([row[kind], certain.expand(steps - len(row[kind]), -1)]) for row in by_row
            ]
            return tuple(torch.stack(filled, 1).unbind())

        found: dict[str, Any] = {
            "sequences": sequences,
            "scores": stacked(1) if config.output_scores and steps else None,
            "logits": stacked(0) if config.output_logits and steps else None,
        }
        return GenerateDecoderOnlyOutput(**found)


def _refuse(model: PreTrainedModel, config: Any, real: Tensor, rest: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    cache = next((rest[name] for name in CACHES if name in rest), None)
    tensors = [name for name, value in rest.items() if isinstance(value, Tensor)]
    unread = sorted({*tensors} - {"attention_mask", "position_ids"})
    asked = {
        f"an encoder-decoder model ({type(model).__name__})": model.config.is_encoder_decoder,
        mode.value.replace("_", " "): mode not in MODES,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "a quantized cache": config.cache_implementation == "quantized",
        "a filled cache": cache is not None and cache.get_seq_length() > 0,
        f"additional inputs ({', '.join(unread)})": bool(unread),
        f"the adapter {_adapter_beside(model)}": _adapter_beside(model) is not None,
        f"peft's {_adapter_of_rows(model)}": _adapter_of_rows(model) is not None,
    }
    for what, wanted in asked.items():
        if wanted:
            raise _unfollowed(what)
    positions, own = rest.get("position_ids"), (real.cumsum(1) - 1).clamp(min=0)
    if positions is not None and not torch.equal(positions * real, own * real):
        raise _unfollowed("custom position_ids")


def _adapter_beside(model: PreTrainedModel) -> str | None:
    """The active adapter of peft that acts through inputs, which only peft's own forward adds.

    During its ``generate``, peft puts a method of its own on the model.
    """
    wrapper: Any = getattr(model.prepare_inputs_for_generation, "__self__", None)
    config: Any = getattr(wrapper, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        return str(config.peft_type.value)
    inside = getattr(model, "peft_config", {}).values()
    late = any(getattr(each, "alora_invocation_tokens", None) for each in inside)
    return "aLoRA" if late else None


def _adapter_of_rows(model: PreTrainedModel) -> str | None:
    """The argument, such as ``adapter_names``, that gives each row an adapter of its own.

    During its ``generate``, peft puts it into hooks of the layers, for exactly the rows it got.
    """
    hooks = (hook for layer in model.modules() for hook in layer._forward_pre_hooks.values())
    for hook in hooks:
        named = getattr(hook, "keywords", {})
        if getattr(getattr(hook, "func", None), "__module__", "").startswith("peft.") and named:
            return ", ".join(named)
    return None


def _unfollowed(what: str) -> UserError:
    return UserError(
        f"speculative decoding does not support {what}",
        "remove it, or generate without custom_generate",
    )


def _refuse_impure(
    given: LogitsProcessorList, prompts: Tensor, classes: int, ends: Sequence[int]
) -> None:
    for each in given:
        fault = fault_of(each, prompts, classes, ends)
        if fault is not None:
            raise UserError(
                f"the logits processor {type(each).__name__} {fault}",
                "remove it, or generate without custom_generate",
            )


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
