"""Tokens that were sampled during the training: their log-probs, and what sampling them weighs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcore.method.positions import MaskedPositions
from kdcore.method.records import SampledTokens

IMPORTANCE = "importance"
"""The name beside the gates' of the weight of tokens that a mixture of both models sampled."""


@torch.no_grad()
def sampled_tokens(positions: MaskedPositions, length: int) -> SampledTokens:
    """Look up what both models say of the labels, which were sampled.

    Args:
        positions: The N masked positions.
        length: Number of positions whose logits exist at a time.

    Returns:
        The tokens, padded as the batch is.
    """
    batch = positions.batch
    student, teacher = torch.zeros(2, batch.mask.numel(), device=batch.mask.device)
    for chunk in positions.chunks(length):
        place = batch.positions[chunk.place]
        student[place] = _of_labels(chunk.logits.student, chunk.logits.labels)
        teacher[place] = _of_labels(chunk.logits.teacher, chunk.logits.labels)
    importance = torch.ones_like(student)
    if batch.teacher_share:
        of_teacher = math.log(batch.teacher_share) + teacher
        of_student = math.log1p(-batch.teacher_share) + student
        importance = (student - torch.logaddexp(of_teacher, of_student)).exp()
    student, teacher, importance = (
        each.view(batch.mask.shape) for each in (student, teacher, importance)
    )
    return SampledTokens(student, teacher, importance, batch.mask, positions.progress)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """[C] the log-probs of labels [1, C] under logits [1, C, V]."""
    return logits.log_softmax(-1).gather(-1, labels[..., None])[0, :, 0]
