"""Example batches: ordinary ones, the same ones cut differently, and extreme ones.

Shapes: see `kdcore.method.records`. Every batch is small, seeded and on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kdcore.method.records import LOG_ZERO, LogitBatch, Part

ROWS, POSITIONS, CLASSES = 3, 32, 32
"""Multiples of 32, which fill a processor's vectors: whole rows then compare bit for bit.

The remainder at the end of a tensor may take another code path, and differ in the last bit. Authors
cannot change that, so pieces of other lengths compare up to rounding.
"""
DTYPES = (torch.float32, torch.bfloat16)
KEPT = CLASSES - 5
"""The first excluded class of a batch with excluded classes; labels are below it."""


def example(
    seed: int = 0,
    progress: float = 0.5,
    dtype: torch.dtype = torch.float32,
    rows: int = ROWS,
    positions: int = POSITIONS,
    classes: int = CLASSES,
) -> LogitBatch:
    """Make a batch without padding, in which the student is near the teacher at some positions.

    Args:
        seed: The seed of the logits and labels.
        progress: The batch's share of the training.
        dtype: The dtype of the logits.
        rows: B.
        positions: T.
        classes: V.

    Returns:
        The batch, with logits [B, T, V] of a student with gradient, a teacher and a reference.
    """
    random = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(rows, positions, classes, generator=random)
    distance = 3 * torch.rand(rows, positions, 1, generator=random)
    student = teacher + distance * torch.randn(teacher.shape, generator=random)
    labels = torch.randint(min(classes, KEPT), (rows, positions), generator=random)
    reference = teacher + torch.randn(teacher.shape, generator=random)
    return LogitBatch(
        student.to(dtype).requires_grad_(),
        teacher.to(dtype),
        labels,
        torch.ones(rows, positions, dtype=torch.bool),
        progress,
        torch.Generator().manual_seed(seed),
        torch.arange(positions).expand(rows, -1),
        reference=reference.to(dtype),
    )


def with_logits(batch: LogitBatch, student: Tensor, teacher: Tensor) -> LogitBatch:
    """Replace the logits [B, T, V] of a batch; the student's require gradient."""
    dtype = batch.student.dtype
    student = student.detach().to(dtype).clone().requires_grad_()
    return replace(batch, student=student, teacher=teacher.detach().to(dtype))


def excluding(
    batch: LogitBatch, student: float = LOG_ZERO, teacher: float = LOG_ZERO
) -> LogitBatch:
    """Exclude the classes from `KEPT` on, by setting them to the given logits."""
    out = torch.arange(batch.student.shape[-1]) >= KEPT
    return with_logits(
        batch, batch.student.masked_fill(out, student), batch.teacher.masked_fill(out, teacher)
    )


def extremes(dtype: torch.dtype = torch.float32) -> dict[str, LogitBatch]:
    """Make batches at which a naive formula gives NaN or infinity: description -> batch."""
    batch = example(dtype=dtype)
    student, teacher, labels = batch.student, batch.teacher, batch.labels
    label = torch.nn.functional.one_hot(labels, CLASSES).bool()
    flat, far = torch.zeros_like(teacher), 1e4 * label
    return {
        "logits of 1e4 and -1e4": with_logits(batch, 1e4 * student.sign(), 1e4 * teacher.sign()),
        "classes excluded": excluding(batch),
        "only the label not excluded": with_logits(
            batch, student.masked_fill(~label, LOG_ZERO), teacher.masked_fill(~label, LOG_ZERO)
        ),
        "the teacher is certain of the label": with_logits(batch, flat, far),
        "the student is certain of the label": with_logits(batch, far, flat),
        "both are certain of different classes": with_logits(batch, far.roll(1, -1), far),
        "all classes alike": with_logits(batch, flat, flat),
        "the student is the teacher": with_logits(batch, teacher, teacher),
        "the reference is certain of another class": replace(batch, reference=far.roll(1, -1)),
        "two classes": example(dtype=dtype, classes=2),
        "one position": example(dtype=dtype, rows=1, positions=1),
    }


def rows_of(batch: LogitBatch) -> list[LogitBatch]:
    """Cut a batch into one batch per row, in order."""
    return [_cut(batch, slice(row, row + 1), slice(None)) for row in range(batch.mask.shape[0])]


def chunks_of(row: LogitBatch, lengths: Sequence[int] = (1, 4)) -> list[LogitBatch]:
    """Cut one row into chunks of positions of the given lengths, and the rest, in order."""
    ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)] + [row.mask.shape[1]]
    return [_cut(row, slice(None), slice(start, end)) for start, end in pairwise(ends)]


def laid_flat(batch: LogitBatch) -> LogitBatch:
    """Lay the N masked positions out as one row [1, N], as a training run does."""
    return _each(lambda piece: piece[batch.mask][None], batch)


def padded(row: LogitBatch, extra: int = POSITIONS) -> LogitBatch:
    """Append ``extra`` positions of noise to one row, outside the mask."""
    noise = example(seed=99, rows=1, positions=extra, dtype=row.student.dtype)
    noise = replace(
        noise,
        student=9 * noise.student,
        teacher=9 * noise.teacher,
        mask=~noise.mask,
        position=row.mask.shape[1] + noise.position,
    )
    return _each(lambda *pieces: torch.cat(pieces, 1), row, noise)


def whole(batch: LogitBatch, tau: float = 1.0) -> Part:
    """Return the undivided part, which the first splitter receives as ``kd``."""
    weight = torch.ones_like(batch.labels, dtype=torch.float32)
    return Part(batch.student / tau, batch.teacher / tau, weight)


def kl_of(part: Part) -> Tensor:
    """Compute a part's weighted forward KL [B, T], which is comparable for any K."""
    student, teacher = part.compared
    return part.weight * (teacher.exp() * (teacher - student)).sum(-1)


def _cut(batch: LogitBatch, rows: slice, positions: slice) -> LogitBatch:
    return _each(lambda piece: piece[rows, positions], batch)


def _each(make: Callable[..., Tensor], first: LogitBatch, *others: LogitBatch) -> LogitBatch:
    """The first batch with every tensor [B, T, ...] made from those of all."""
    names = ["student", "teacher", "labels", "mask", "position"]
    names += ["reference"] if first.reference is not None else []
    made: dict[str, Any] = {
        name: make(*(getattr(batch, name) for batch in (first, *others))) for name in names
    }
    return replace(first, **made)
