"""Divergences between student and teacher: [B, T] in nats from log-probs [B, T, K] of both.

A class that both exclude has a log-prob near `kdcore.method.records.LOG_ZERO`. Its probability is
exactly 0 and its logarithm is finite, so every product below and its gradient are exactly 0 there.
Hence the code mixes distributions in log space, where they stay finite, and never takes log(exp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcore import Params, by_keywords
from kdcore_baselines.method import params
from kdcore_baselines.method.stateless import stateless

if TYPE_CHECKING:
    from kdcore import BuildContext


class _ToFixedTarget(torch.autograd.Function):
    """KL(target || student) for a constant target; the gradient for the student is -target.

    This is the default loss, so the backward pass is written by hand: that of autograd takes 25 %
    more time, and five tensors of [B, T, K] instead of three.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        target_probs = target.exp()
        ctx.save_for_backward(target_probs)
        return (target - student).mul_(target_probs).sum(-1)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (target_probs,) = ctx.saved_tensors
        return -cotangent.unsqueeze(-1) * target_probs, None


def kl_to(target: Tensor, student: Tensor) -> Tensor:
    """Compute KL(target || student) for a constant target.

    Args:
        target: [B, T, K] log-probs, without gradient.
        student: [B, T, K] log-probs.

    Returns:
        The divergence [B, T] in nats.
    """
    distance: Tensor = _ToFixedTarget.apply(student, target)  # type: ignore[no-untyped-call]
    return distance


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Compute KL(first || second) = sum_v first_v (log first_v - log second_v).

    Args:
        first: [B, T, K] log-probs.
        second: [B, T, K] log-probs.

    Returns:
        The divergence [B, T] in nats.
    """
    return (first.exp() * (first - second)).sum(-1)


def mixture(share: float, first: Tensor, second: Tensor) -> Tensor:
    """Mix two distributions.

    Args:
        share: Share of the first distribution, strictly between 0 and 1.
        first: [B, T, K] log-probs.
        second: [B, T, K] log-probs.

    Returns:
        The log-probs [B, T, K] of share first + (1 - share) second.
    """
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


@stateless(Params)
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student)."""
    return kl_to(teacher, student)


@stateless(Params)
def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher)."""
    return kl(student, teacher)


@stateless(params.JSD)
def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    The formula is 0 at both ends; by convention beta = 0 means forward KL and 1 reverse KL.
    """
    if beta == 0:
        return kl_to(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    m = mixture(beta, teacher, student)
    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)


@stateless(params.Skew)
def skew_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student)."""
    return kl(teacher, mixture(alpha, teacher, student))


@stateless(params.SkewReverse)
def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float, detached: bool) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher), optionally of a constant mixture."""
    mixed = mixture(alpha, student, teacher)
    return kl(student, mixed.detach() if detached else mixed)


@stateless(Params)
def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the sum over classes of |teacher - student|, in [0, 1]."""
    return (_normal_exp(teacher) - _normal_exp(student)).abs().sum(-1) / 2


def _normal_exp(logp: Tensor) -> Tensor:
    """exp, at least 2e-35, which no sum of probabilities feels.

    A CPU takes 10 to 40 times as long for a result that is no normal float32, or a product with it.
    Sorted classes have mostly these: the zeros appended to the smaller vocabulary, and the
    products of merged spans.
    """
    return logp.clamp(min=_LEAST).exp()


_LEAST = -80.0


@stateless(params.AlphaBeta)
def alpha_beta(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha-beta divergence: KL(teacher || student) at (1, 0), KL(student || teacher) at (0, 1).

    With s = alpha + beta, sum_v (alpha p^s + beta q^s - s p^alpha q^beta) / (s alpha beta) for the
    teacher p and the student q. The code divides by the larger of p^s and q^s, so that nothing
    overflows and equal probabilities give exactly 0. Source: ABKD, arXiv 2505.04560.
    """
    if alpha == 0:
        return _logarithmic(student, teacher, beta)
    if beta == 0:
        return _logarithmic(teacher, student, alpha)
    total, gap = alpha + beta, student - teacher
    power = beta + (alpha - beta) * (gap > 0).to(gap)  # that of the larger probability
    below = -gap.abs()
    each = (power / total * (total * below).expm1() - (power * below).expm1()) / (alpha * beta)
    return ((total * torch.maximum(student, teacher)).exp() * each).sum(-1)


def _logarithmic(first: Tensor, second: Tensor, power: float) -> Tensor:
    """The limit sum_v (a^power (power log(a / b) - 1) + b^power) / power^2 of `alpha_beta`."""
    gap = power * (first - second)
    above = gap + (-gap.clamp(min=0)).expm1()
    low = gap.clamp(max=0)
    below = low.expm1() * (low - 1) + low
    largest = (power * torch.maximum(first, second)).exp()
    return (largest * torch.where(gap > 0, above, below)).sum(-1) / power**2


def mass_on_head(values: Tensor, probs: Tensor, mass: float) -> Tensor:
    """Sum values over the head of a distribution.

    The head is the top class, and the following ones while their cumulative probability is at most
    `mass`. It is short except in nearly uniform distributions, so on a CPU the code ranks only as
    many classes as the head requires: sorting a vocabulary takes many times as long as the loss.
    An accelerator ranks them all, since the host would wait for it to learn how many suffice.

    Args:
        values: [B, T, K] values to sum.
        probs: [B, T, K] probabilities that define the head.
        mass: Maximum cumulative probability of the head.

    Returns:
        The sums [B, T].
    """
    classes = probs.shape[-1]
    depth = 64 if probs.device.type == "cpu" else classes
    while True:
        ranked, order = probs.topk(min(depth, classes))
        cumulative = ranked.cumsum(-1)
        if depth >= classes or bool((cumulative[..., -1] > mass).all()):
            break
        depth *= 4
    in_head = cumulative <= mass
    in_head[..., 0] = True
    return (values.gather(-1, order) * in_head).sum(-1)


@stateless(params.AKL)
def akl(student: Tensor, teacher: Tensor, mass: float) -> Tensor:
    """Adaptive KL: share KL(teacher || student) + (1 - share) KL(student || teacher).

    The share is the part of sum |teacher - student| on the teacher's head; it has no gradient.
    Source: arXiv 2404.02657.
    """
    if mass == 1:  # all classes are the head, however the sum of their probabilities is rounded
        return kl_to(teacher, student)
    with torch.no_grad():
        teacher_probs = teacher.exp()
        gap = (teacher_probs - student.exp()).abs()
        total = gap.sum(-1)
        # Equal distributions have no gap, and both KLs are 0.
        share = mass_on_head(gap, teacher_probs, mass) / total.where(total > 0, 1)
    return share * kl_to(teacher, student) + (1 - share) * kl(student, teacher)


class TAID:
    """TAID: KL(target || student) with target = softmax((1 - t) student + t teacher) of logits.

    As t increases, the target moves from the student to the teacher: linearly with the progress,
    and faster while J, the mean of this divergence, falls. d = (J_prev - J) / J_prev, at least -1,
    m = decay m + (1 - decay) d, t = min(end, max(linear, t + alpha sigmoid(m) (1 - t))). Source:
    arXiv 2501.16937.
    """

    @by_keywords(params.TAID)
    def __init__(self, params: params.TAID, context: BuildContext) -> None:
        self.params = params
        self.t = params.start
        self.momentum = 0.0
        self.previous = math.inf
        """J of the previous step; infinite before the first step."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        # Log-probs may replace logits: the softmax ignores their constant difference.
        target = student.detach().lerp(teacher, self.t).log_softmax(-1)
        return kl_to(target, student)

    def step_done(self, metrics: Mapping[str, float]) -> None:
        start, end = self.params.start, self.params.end
        loss, previous = metrics["distilled"], self.previous
        self.previous = loss
        if math.isinf(previous):
            return
        # J is 0, or what rounding leaves of it, while the target is the student: start: 0
        gain = max(-1.0, (previous - loss) / previous) if previous > 0 else 0.0
        decay = self.params.decay
        self.momentum = decay * self.momentum + (1 - decay) * gain
        linear = start + metrics["progress"] * (end - start)
        sigmoid = (1 + math.tanh(self.momentum / 2)) / 2  # unlike exp, it cannot overflow
        faster = self.t + self.params.alpha * sigmoid * (1 - self.t)
        self.t = min(end, max(linear, faster))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"t": self.t, "momentum": self.momentum, "previous": self.previous}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.t = state["t"].item()
        self.momentum = state["momentum"].item()
        self.previous = state["previous"].item()
