"""Splitters that divide the distillation loss "kd" at the label.

q and r are the student's and the teacher's softened distributions, y is the label, and a hat means
renormalisation over the other classes (arXiv 2203.08679, 2505.15133):

    target      KL([r_y, 1 - r_y] || [q_y, 1 - q_y])
    non_target  KL(r_hat || q_hat)
    kd          = target + (1 - r_y) non_target, exactly, at each position
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdcore import BuildContext, Params, UserError, by_keywords
from kdcore.method.records import LOG_ZERO, LogitBatch, Part
from kdcore.method.schedule import value_at
from kdcore_deepkd.params import CurriculumParams, DKDParams
from kdcore_deepkd.top_k_mask import TopKMask


class TaskKD:
    """Splitter of DOT (ICCV 2023), which leaves "kd" whole.

    DOT's two components are the cross-entropy with the label and the whole distillation loss. The
    first is the term "task", which every objective has without a splitter: a spec sets its weight.
    So there is nothing to split; the name documents the choice in a spec.
    """

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return dict(parts)


class Standardise:
    """Splitter that divides the logits of "kd" by their standard deviation (arXiv 2403.01643).

    The mean is not subtracted, since the softmax ignores a shift. The standard deviation is that of
    the logits at tau = 1 in `LogitBatch`, because the part's logits are already divided by tau and
    standardising those would undo the division.
    """

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        _whole_among(names, "standardise")
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        kd = parts["kd"]
        # equal logits have standard deviation 0
        student = kd.student / (_deviation(batch.student) + 1e-7)
        teacher = kd.teacher / (_deviation(batch.teacher) + 1e-7)
        return {**parts, "kd": replace(kd, student=student, teacher=teacher)}


class TargetSplit:
    """Splitter of "kd" into target (K = 2) and non_target (K = V), which add up to "kd"."""

    name = "target_split"

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        _whole_among(names, self.name)
        return (*(name for name in names if name != "kd"), "target", "non_target")

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        kd = parts["kd"]
        if kd.student.shape[-1] != batch.student.shape[-1]:
            raise UserError(
                f"{self.name} requires all classes of 'kd', but a splitter before it removed some",
                f"put {self.name} before top_k_mask, and let top_k_mask mask 'non_target'",
            )
        # outside the mask a label may have any value, even an invalid class
        label = batch.labels.masked_fill(~batch.mask, 0).unsqueeze(-1)
        student_target, student_rest = _cut(kd.student, label)
        teacher_target, teacher_rest = _cut(kd.teacher, label)
        rest = torch.sigmoid(-teacher_target[..., 0])  # 1 - r_y, not rounded to 0 next to r_y = 1
        target_weight, non_target_weight = self.weigh(kd.weight, rest, batch.progress)
        return {
            **{name: part for name, part in parts.items() if name != "kd"},
            "target": Part(student_target, teacher_target, target_weight),
            "non_target": Part(student_rest, teacher_rest, non_target_weight),
        }

    def weigh(self, weight: Tensor, rest: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Compute the weights of both parts.

        Args:
            weight: [B, T] weight of "kd".
            rest: [B, T] teacher's probability 1 - r_y of the other classes.
            progress: Share of the training done.

        Returns:
            The weights [B, T] of target and non_target.
        """
        return weight, weight * rest


class DKD(TargetSplit):
    """Splitter with free weights: warm-up x (alpha target + beta non_target)."""

    name = "dkd"

    @by_keywords(DKDParams)
    def __init__(self, params: DKDParams, context: BuildContext) -> None:
        self.params = params

    def weigh(self, weight: Tensor, rest: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        warmup = self.params.warmup
        warm = value_at([(0.0, 0.0), (warmup, 1.0)], progress) if warmup else 1.0
        return weight * (warm * self.params.alpha), weight * (warm * self.params.beta)


class DeepKDSplitter:
    """Splitter that applies target_split, then the dynamic top-k mask to non_target."""

    @by_keywords(CurriculumParams)
    def __init__(self, params: CurriculumParams, context: BuildContext) -> None:
        self.split = TargetSplit()
        self.mask = TopKMask(part="non_target", unit=params.unit, k=params.k)

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return self.mask.parts(self.split.parts(names))

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return self.mask(self.split(parts, batch), batch)


def _whole_among(names: tuple[str, ...], splitter: str) -> None:
    if "kd" not in names:
        raise UserError(
            f"{splitter} requires the part 'kd', but the splitter before it leaves only "
            + ", ".join(f"'{name}'" for name in names),
            f"put {splitter} first, or remove one of the two",
        )


def _deviation(logits: Tensor) -> Tensor:
    """Compute the standard deviation [..., 1] over the classes that are not excluded.

    Excluded classes would dominate it, so they take the mean of the others, which adds nothing.
    """
    kept = logits > LOG_ZERO
    count = kept.sum(-1, keepdim=True)
    mean = (logits * kept).sum(-1, keepdim=True) / count
    spread = logits.where(kept, mean).std(-1, keepdim=True)
    return spread * ((logits.shape[-1] - 1) / (count - 1).clamp(min=1)).sqrt()


def _cut(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits into label against rest, [log-odds, 0] [B, T, 2], and the rest [B, T, V].

    The log-odds z_y - logsumexp(other z) do not underflow where the label's probability is close
    to 0 or 1; from probabilities, log(1 - q_y) would be -inf.
    """
    rest = logits.scatter(-1, label, LOG_ZERO)
    odds = logits.gather(-1, label) - rest.logsumexp(-1, keepdim=True)
    return torch.cat([odds, torch.zeros_like(odds)], -1), rest
