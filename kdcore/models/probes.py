"""What passes over a few tokens tell of a model: its head, its causality, how it reads rows."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from kdcore.errors import UserError, first_line
from kdcore.method.logits import Head

ROWS, LENGTH, PREFIX = 2, 12, 4
"""The probes' rows, their tokens, and the first of these, which `refuse_bidirectional` keeps."""
_FAULTS = AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError
LOUD = 100.0
"""Size of logits at which a soft cap, by which models keep them below 30 or 50, shows."""


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Tell the mistake where a model's own code fails inside the context.

    Some families read rows of some lengths only, or need inputs beside the tokens.

    Args:
        model: The model that runs inside the context; it may be wrapped.

    Raises:
        UserError: The code of the model, or of a library below it, raised an error.
    """
    try:
        yield
    except _FAULTS as fault:
        plain = getattr(model, "module", model)
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        if not _failed_inside(plain, fault):
            raise
        raise _failing(plain, fault) from fault


@torch.no_grad()
def refuse_reluctant(model: Any) -> None:
    """Check, without weights, that the code of a model does not refuse plain tokens.

    Only a ValueError that the code of its own family raises says so: other passes end on the meta
    device since no tensor has values there.

    Args:
        model: The model, on the meta device.

    Raises:
        UserError: The code of the model refuses them.
    """
    classes, family = model.get_input_embeddings().weight.shape[0], type(model).__module__
    try:
        with _evaluating(model):
            model(input_ids=_tokens(classes, torch.device("meta")), use_cache=False)
    except ValueError as fault:
        if traceback.extract_tb(fault.__traceback__)[-1].filename == sys.modules[family].__file__:
            raise _failing(model, fault) from fault
    except Exception:
        return


def _failed_inside(model: nn.Module, fault: BaseException) -> bool:
    """Whether a model's code was called as it can be, and the error is its own.

    A wrong call fails before the model's code begins, and a fault of a hook, kdcore's or another's,
    in code that is neither that of a module of the model nor of torch or transformers.
    """
    own = {type(each).__module__ for each in model.modules()}
    libraries = {"torch", "transformers"} | {each.partition(".")[0] for each in own}
    passed = [
        str(frame.f_globals.get("__name__", "torch"))  # what torch compiled has no name
        for frame, _ in traceback.walk_tb(fault.__traceback__)
    ]
    of_pass = list(dropwhile(lambda module: module.partition(".")[0] not in libraries, passed))
    begun = type(model).__module__ in of_pass
    return begun and {each.partition(".")[0] for each in of_pass} <= libraries


@torch.no_grad()
def body_and_head_agree(model: nn.Module, decoder: nn.Module, head: Callable[[], Head]) -> bool:
    """Whether body and head, run separately, give the logits of the whole model.

    The comparison is relative to the logits, and repeated with hidden states of other sizes: an
    untrained model has logits so small that a scale or a soft cap would not show.

    Args:
        model: A causal language model.
        decoder: Its body.
        head: A function that returns its head.

    Returns:
        The result of a comparison on a few tokens.
    """
    weight = head().weight
    if weight is None or weight.device.type == "meta" != model_device(model).type:
        return False  # no linear head, or one whose weights are kept elsewhere between passes
    tokens = _tokens(len(weight), model_device(model))
    factor = 1.0
    with _evaluating(model):
        for _ in range(2):
            try:
                with last_hidden_states(decoder, factor) as hidden:
                    whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
            except (TypeError, ValueError):  # an architecture without logits_to_keep
                return False
            # get_decoder may return another part than the body (ModernBertDecoder: of its head)
            if not hidden or hidden[0].ndim != 3 or hidden[0].shape[-1] != weight.shape[1]:
                return False
            whole = whole[:, -1].float().to(weight.device)
            apart = head().finish(head().linear(hidden[0][:, -1].to(weight.device)))
            size = float(whole.abs().max())
            if apart.shape != whole.shape or float((apart - whole).abs().max()) > size / 50:
                return False
            factor = LOUD / size if size else 1.0
    return True


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, which reads its inputs."""
    return next(model.parameters()).device


@contextmanager
def last_hidden_states(decoder: nn.Module, factor: float = 1.0) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of the passes that run inside the context.

    Args:
        decoder: The body of a model.
        factor: Factor by which the hidden states are multiplied, in place, before they are read.

    Yields:
        A list that receives [B, T, H] from each pass.
    """
    seen: list[Tensor] = []

    def see(module: nn.Module, given: Any, output: Any) -> None:
        seen.append(output[0] if factor == 1.0 else output[0].mul_(factor))

    handle = decoder.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


def refuse_bidirectional_config(config: PreTrainedConfig, name: str) -> None:
    """Check, without weights, that a language model is not an encoder.

    Args:
        config: The config of the model.
        name: Name of the model in the message.

    Raises:
        UserError: The family is that of a masked language model, and the config does not make it
            causal.
    """
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        raise _bidirectional(name, f"model_type {config.model_type} without is_decoder")


@torch.no_grad()
def refuse_bidirectional(model: Any, name: str) -> None:
    """Check that the logits of a language model do not depend on later tokens.

    A model that reads the tokens that it predicts would have a perplexity near 1 on any text.

    Args:
        model: The model.
        name: Name of the model in the message.

    Raises:
        UserError: Later tokens change earlier logits, or the model fails on plain tokens.
    """
    classes = model.get_input_embeddings().weight.shape[0]
    tokens = _tokens(classes, model.device)
    other = tokens.clone()
    other[:, PREFIX:] = (tokens[:, PREFIX:] + classes // 2) % classes
    # in one pass: int8 kernels choose the columns to round by all of its tokens
    with _evaluating(model), running(model):
        logits = model(input_ids=torch.cat([tokens, other]), use_cache=False).logits.float()
    one, two = logits.chunk(2)
    change = (one - two).abs()
    # exactly 0 but for kernels that group tokens, such as those of experts
    noise = 1e-4 if model.dtype == torch.float32 else 2e-2
    if float(change[:, :PREFIX].max()) > noise * float(change[:, PREFIX:].max()):
        raise _bidirectional(name, "its logits depend on later tokens")


def flattens_packed_rows(model: Any) -> bool:
    """Whether a model keeps packed rows apart only in one single sequence without padding."""
    return "flash" in str(model.config.get_text_config()._attn_implementation)


@torch.no_grad()
def refuse_mixing(model: Any, name: str, *, flat: bool) -> None:
    """Check that a language model keeps the rows of a packed sequence apart.

    The logits of a row must not depend on the rows before it, and must be those of the row alone.
    Without weights only the arguments of the forward pass are known.

    Args:
        model: The model.
        name: Name of the model in the message.
        flat: See `kdcore.data.batching.packing.Packing`.

    Raises:
        UserError: The model is a classifier, or mixes the rows.
    """
    if not model.can_generate():
        raise UserError(
            f"training.packing packs rows of a language model, and {name} is a classifier",
            "replace training.packing by training.group_by_length: true",
            "training.packing",
        )
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in signature(plain.forward).parameters:
        raise _mixing(name, "its forward pass does not take position_ids")
    if model_device(model).type == "meta":
        return
    classes = model.get_input_embeddings().weight.shape[0]
    first, last = _tokens(classes, model_device(model))
    split, end = LENGTH // 2 + 1, LENGTH - 2
    rows = [first[:split], first[split:], last[:end]]
    count = [torch.arange(length, device=first.device) for length in map(len, rows)]
    begun, joined = torch.cat(count[:2]), torch.stack([first, last])
    positions = torch.stack([begun, torch.cat([count[2], count[0][: LENGTH - end]])])
    if flat:
        joined, positions = torch.cat(rows)[None], torch.cat(count)[None]
    other = joined.clone()
    other[0, :split] = (joined[0, :split] + classes // 2) % classes
    with _evaluating(model):
        one, two = (
            model(input_ids=each, position_ids=positions, use_cache=False).logits.float()
            for each in (joined, other)
        )
        alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
    one, two = (each.flatten(0, 1)[: sum(map(len, rows))] for each in (one, two))
    change, expected = (one - two).abs(), torch.cat(alone)
    crossing, noise = (1e-4, 1e-3) if model.dtype == torch.float32 else (2e-2, 5e-2)
    if float(change[split:].max()) > crossing * float(change[:split].max()):
        raise _mixing(name, "the logits of a row depend on the row before it")
    if float((one - expected).abs().max()) > noise * float(expected.abs().max()):
        raise _mixing(name, "the logits of a row differ from those of the row alone")


def pools_before_padding(model: Any) -> bool:
    """Whether a classifier reads the last token before the padding token of its config."""
    known, model.config.pad_token_id = model.config.pad_token_id, None
    try:
        with torch.no_grad(), _evaluating(model):
            model(input_ids=torch.ones(2, 2, dtype=torch.int64, device=model.device))
    except ValueError:  # a batch without a padding token
        return True
    finally:
        model.config.pad_token_id = known
    return False


def _failing(model: Any, fault: Exception) -> UserError:
    return UserError(
        f"the code of {type(model).__name__} fails on these rows: {first_line(fault)}",
        "check the rows and the model's settings, or choose a model of another family; --debug "
        "shows where its code fails",
    )


def _bidirectional(name: str, why: str) -> UserError:
    return UserError(
        f"{name} is not a causal language model: {why}",
        "choose a decoder-only language model; a new student of an encoder's family needs "
        "student.config.is_decoder: true",
    )


def _mixing(name: str, why: str) -> UserError:
    return UserError(
        f"{name} does not keep packed rows apart: {why}",
        "replace training.packing by training.group_by_length: true",
        "training.packing",
    )


def _tokens(classes: int, device: torch.device) -> Tensor:
    """Token ids [ROWS, LENGTH] from all of a vocabulary, the same at each call."""
    drawn = torch.randint(classes, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
