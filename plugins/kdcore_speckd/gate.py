"""SpecKD: distil at the positions where the teacher accepts the student's proposal.

    L = mean over sequences of (1 / |y|) sum_t V_t D(teacher_t, student_t),   V_t = 1 or beta

Source: arXiv 2510.24021. This module computes V only, always at temperature 1; the objective
computes D and the mean. A verification returns [B, T] float, the acceptance probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore import BuildContext, LogitBatch, by_keywords
from kdcore_speckd.plugin import SpecKDParams, SpecKDv1Params


class SpecKD:
    """Gate with weight 1 where the teacher accepts the student's proposal, else `floor` (beta)."""

    @by_keywords(SpecKDParams)
    def __init__(self, params: SpecKDParams, context: BuildContext) -> None:
        self.verify = VERIFICATIONS[params.verification]
        self.k = params.k
        self.floor = params.beta
        self.teacher_classes = params.k if params.verification == "greedy" else None

    @torch.no_grad()
    def __call__(self, batch: LogitBatch) -> Tensor:
        accepted_BT = self.verify(batch, self.k)
        return accepted_BT + (1 - accepted_BT) * self.floor


@by_keywords(SpecKDv1Params)
def speckd_v1(params: SpecKDv1Params, context: BuildContext) -> SpecKD:
    """The gate under the defaults of the paper's first version, which masks what is refused."""
    return SpecKD(**dict(params))


def greedy(batch: LogitBatch, k: int) -> Tensor:
    """Accept a position if the student's most likely token is in the teacher's top k.

    That is, if fewer than k teacher logits are strictly larger than that token's: counting takes
    one pass, while ranking the vocabulary takes many.

    Args:
        batch: Logits of student and teacher.
        k: Number of top teacher tokens.

    Returns:
        The acceptance [B, T], 0 or 1.
    """
    proposal_BT1 = batch.student.argmax(-1, keepdim=True)
    better_BTV = batch.teacher > batch.teacher.gather(-1, proposal_BT1)
    return (better_BTV.sum(-1, dtype=torch.int32) < k).to(batch.student.dtype)


def sampling(batch: LogitBatch, k: int) -> Tensor:
    """Sample k tokens from the student; accept if any has u < min(1, teacher / student).

    Args:
        batch: Logits of student and teacher.
        k: Number of samples.

    Returns:
        The acceptance [B, T], 0 or 1.
    """
    student_BTV, teacher_BTV = batch.student.softmax(-1), batch.teacher.softmax(-1)
    # All samples in one call, positions first, so that chunks of positions draw the same numbers.
    uniform = torch.rand(
        (*batch.mask.shape, 2, k),
        generator=batch.generator,
        dtype=student_BTV.dtype,
        device=student_BTV.device,
    )
    place_BTk, u_BTk = uniform.unbind(-2)
    cdf_BTV = student_BTV.cumsum(-1)
    # A place in (0, total] always hits a token of positive probability, despite rounding.
    token_BTk = torch.searchsorted(cdf_BTV, (1 - place_BTk) * cdf_BTV[..., -1:])
    ratio_BTk = teacher_BTV.gather(-1, token_BTk) / student_BTV.gather(-1, token_BTk)
    return (u_BTk < ratio_BTk.clamp(max=1)).any(-1).to(batch.student.dtype)


def expected(batch: LogitBatch, k: int) -> Tensor:
    """Compute the expectation of `sampling`: 1 - TV^k, where TV is the total variation.

    One sample is accepted with probability sum_v min(student_v, teacher_v) = 1 - TV.

    Args:
        batch: Logits of student and teacher.
        k: Number of samples.

    Returns:
        The acceptance probability [B, T].
    """
    gap_BTV = (batch.teacher.softmax(-1) - batch.student.softmax(-1)).abs()
    return 1 - (gap_BTV.sum(-1) / 2).clamp(max=1) ** k


VERIFICATIONS = {"greedy": greedy, "sampling": sampling, "expected": expected}
