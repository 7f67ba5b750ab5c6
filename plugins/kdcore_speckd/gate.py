"""SpecKD: distil where the teacher accepts what the student proposes.

    L = mean over sequences of (1 / |y|) sum_t V_t D(teacher_t, student_t),   V_t = 1 or beta

Source: arXiv 2510.24021. This file decides V alone, always at temperature 1; D and the mean are the
objective's. A verification gives [B, T] float, the probability that a position is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore import BuildContext, LogitBatch, by_keywords
from kdcore_speckd.plugin import SpecKDParams, SpecKDv1Params


class SpecKD:
    """Weight 1 where the student's proposal is accepted, beta (here `floor`) elsewhere."""

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
    """Accepted iff the student's most likely token is among the teacher's k most likely.

    That is, iff fewer than k teacher logits are strictly larger than that token's: counting
    takes one pass where ranking the vocabulary would take many.
    """
    proposal_BT1 = batch.student.argmax(-1, keepdim=True)
    better_BTV = batch.teacher > batch.teacher.gather(-1, proposal_BT1)
    return (better_BTV.sum(-1, dtype=torch.int32) < k).to(batch.student.dtype)


def sampling(batch: LogitBatch, k: int) -> Tensor:
    """Draw k tokens from the student; accepted iff any has u < min(1, teacher / student)."""
    student_BTV, teacher_BTV = batch.student.softmax(-1), batch.teacher.softmax(-1)
    # All draws in one call, positions first: chunks of the positions then draw the same numbers.
    uniform = torch.rand(
        (*batch.mask.shape, 2, k),
        generator=batch.generator,
        dtype=student_BTV.dtype,
        device=student_BTV.device,
    )
    place_BTk, u_BTk = uniform.unbind(-2)
    cdf_BTV = student_BTV.cumsum(-1)
    # A place in (0, total] falls on a token of positive probability, whatever the rounding.
    token_BTk = torch.searchsorted(cdf_BTV, (1 - place_BTk) * cdf_BTV[..., -1:])
    ratio_BTk = teacher_BTV.gather(-1, token_BTk) / student_BTV.gather(-1, token_BTk)
    return (u_BTk < ratio_BTk.clamp(max=1)).any(-1).to(batch.student.dtype)


def expected(batch: LogitBatch, k: int) -> Tensor:
    """The mean of `sampling`, without its variance: 1 - TV^k, TV the total variation.

    One draw is accepted with probability sum_v min(student_v, teacher_v) = 1 - TV.
    """
    gap_BTV = (batch.teacher.softmax(-1) - batch.student.softmax(-1)).abs()
    return 1 - (gap_BTV.sum(-1) / 2).clamp(max=1) ** k


VERIFICATIONS = {"greedy": greedy, "sampling": sampling, "expected": expected}
