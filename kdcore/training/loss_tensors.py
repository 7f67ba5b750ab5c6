"""The tensors that a training loop gives to `kdcore.training.loss.DistillationLoss`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdcore.errors import UserError, with_article
from kdcore.method.logits import Head

IGNORED = -100
"""The label of a position that is not learned, as transformers has it."""

Logits: TypeAlias = Tensor | tuple[Tensor, "nn.Linear | Head"]
"""Logits [B, T, V], or hidden states [B, T, H] and the linear head that makes logits of them;
without T for a classifier."""


def made_of(logits: Logits) -> tuple[Tensor, Head]:
    """What is given at each position, and the head that makes logits of it."""
    if isinstance(logits, Tensor):
        return logits, Head()
    hidden, head = logits
    return hidden, head if isinstance(head, Head) else Head(head.weight, head.bias)


def classes_of(logits: Logits) -> int:
    """The number of classes of logits, or of the head that makes them."""
    made, head = made_of(logits)
    return made.shape[-1] if head.weight is None else head.shape[0]


def refuse_other_types(given: Mapping[str, Any], labels: Any, mask: Any) -> None:
    """Check what the arguments of a loss are.

    Args:
        given: The logits by the name of their model.
        labels: The labels.
        mask: The mask, or None.

    Raises:
        UserError: Logits or hidden states are not floating-point tensors, labels not integers of
            [B, T] or [B], or the mask is neither bool nor integers of the labels' shape.
    """
    for who, logits in given.items():
        pair = isinstance(logits, tuple) and len(logits) == 2
        tensor, head = logits if pair else (logits, Head())
        if not isinstance(head, nn.Linear | Head) or not _is(tensor, torch.is_floating_point):
            raise UserError(
                f"the {who}'s logits are {_kind(logits)}",
                "pass a floating-point tensor, or a tuple of hidden states and an nn.Linear",
            )
    if not _is(labels, _of_integers) or labels.ndim not in (1, 2):
        raise UserError(
            f"the labels are {_kind(labels)}",
            f"pass integers [B, T], or [B] for a classifier, with {IGNORED} where nothing is "
            "learned",
        )
    if mask is None:
        return
    if not _is(mask, lambda t: t.dtype == torch.bool or _of_integers(t)):
        raise UserError(f"the mask is {_kind(mask)}", "pass a bool tensor, or one of 0 and 1")
    if mask.shape != labels.shape:
        raise UserError(
            f"the mask {list(mask.shape)} does not fit labels {list(labels.shape)}",
            "pass a mask of the labels' shape",
        )


def refuse_unlike(given: Mapping[str, Logits], labels: Tensor, cut: int | None) -> None:
    """Check that logits have the same rows, positions and classes.

    Args:
        given: The logits by the name of their model.
        labels: [B, T] or [B].
        cut: The number of classes that are compared; None for all.

    Raises:
        UserError: They do not.
    """
    for who, logits in given.items():
        found, wanted = list(made_of(logits)[0].shape), list(labels.shape)
        if found[:-1] != wanted:
            raise UserError(
                f"the {who}'s tensor {found} does not fit labels {wanted}",
                "pass [B, T, V] with labels [B, T], or [B, V] with labels [B] for a classifier",
            )
    classes = {who: classes_of(logits) for who, logits in given.items()}
    if cut is None and len(set(classes.values())) > 1:
        each = ", ".join(f"{who} {count}" for who, count in classes.items())
        raise UserError(
            f"the models have different numbers of classes: {each}",
            f"if the rest is padding, pass classes={min(classes.values())}; models of "
            "different tokenizers cannot be compared",
        )
    if cut is not None and min(classes.values()) < cut:
        raise UserError(
            f"classes={cut}, but a model has {min(classes.values())}",
            f"pass classes={min(classes.values())} or less",
        )


def learned_rows(labels: Tensor, learned: Tensor, classes: int) -> int:
    """The number of rows with a learned position. On an accelerator, the host waits for it once.

    Args:
        labels: [B, T] int64.
        learned: [B, T] bool, the learned positions.
        classes: The number V of classes.

    Returns:
        The number.

    Raises:
        UserError: The label of a learned position is below 0, or not below V.
    """
    outside = learned & ((labels < 0) | (labels >= classes))
    rows, wrong = torch.stack([learned.any(1).sum(), outside.sum()]).tolist()
    if wrong:
        raise UserError(
            f"the labels contain {int(labels[outside][0])}, but the classes are 0 to {classes - 1}",
            f"set such labels to {IGNORED}, or leave them out with mask=",
        )
    return int(rows)


def whole_of(num_items: float | Tensor | None, counted: int, field: str) -> float:
    """What the loss of a step is a mean over.

    Args:
        num_items: What the caller says; None to count those of the micro-batch.
        counted: The number of items of the micro-batch.
        field: What the items are.

    Returns:
        The number, at least 1.

    Raises:
        UserError: It is not a number, is negative, or is 0 although there are items.
    """
    if num_items is None:
        return max(1.0, counted)
    one = not isinstance(num_items, Tensor) or num_items.numel() == 1
    known = one and isinstance(num_items, int | float | Tensor)
    whole = float(num_items) if known else math.nan
    if not math.isfinite(whole) or whole < min(counted, 1):
        raise UserError(
            f"num_items={num_items!r} is not a number of {field}, and this micro-batch has "
            f"{counted}",
            f"pass the number of {field} in all micro-batches of the step",
        )
    return max(1.0, whole)


def _is(value: Any, has: Any) -> bool:
    return isinstance(value, Tensor) and bool(has(value))


def _of_integers(tensor: Tensor) -> bool:
    plain = not (tensor.is_floating_point() or tensor.is_complex())
    return plain and tensor.dtype != torch.bool


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{with_article(name)} tensor {list(value.shape)}"
    return with_article(type(value).__name__)
