"""Checks and hooks for running the body and the head of a model separately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdcore.method.logits import Head


@torch.no_grad()
def body_and_head_agree(model: nn.Module, decoder: nn.Module, head: Callable[[], Head]) -> bool:
    """Whether body and head, run separately, give the logits of the whole model.

    Args:
        model: A causal language model.
        decoder: Its body.
        head: A function that returns its head.

    Returns:
        The result of a comparison on 4 tokens.
    """
    tokens = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    training = model.training
    model.eval()
    try:
        with last_hidden_states(decoder) as hidden:
            whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    except (TypeError, ValueError):  # an architecture without logits_to_keep
        return False
    finally:
        model.train(training)
    weight = head().weight
    # get_decoder may return another part than the body (ModernBertDecoder: a part of its head)
    if weight is None or not hidden or hidden[0].ndim != 3:
        return False
    if hidden[0].shape[-1] != weight.shape[1]:
        return False
    apart = head().finish(head().linear(hidden[0][:, -1]))
    return apart.shape == whole.shape and torch.allclose(apart, whole, rtol=1e-2, atol=1e-2)


@contextmanager
def last_hidden_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of the passes that run inside the context.

    Args:
        decoder: The body of a model.

    Yields:
        A list that receives [B, T, H] from each pass.
    """
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()
