"""Cuts of the whole knowledge, "kd", at the label.

With q and r the student's and the teacher's softened distributions, y the label, and hats for
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
    """Leaves {"kd": whole} as it is: DOT's cut (ICCV 2023).

    DOT's two components are the label's cross-entropy and the whole distillation loss. The first
    is the term "task", which every objective offers and no splitter makes: a spec gives it a
    weight. So there is nothing left to cut; the name is for specs that want to say so.
    """

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return dict(parts)


class Standardise:
    """Divides both logits of "kd" by their standard deviation over the classes (2403.01643).

    Their means need no subtraction, since the softmax does not see a shift. At tau = 1, where
    `LogitBatch` holds the logits, because a part's are already divided by tau and standardising
    those would undo it.
    """

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        _whole_among(names, "standardise")
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        kd = parts["kd"]
        # where all logits are equal there is no scale, and nothing to divide
        student = kd.student / (_deviation(batch.student) + 1e-7)
        teacher = kd.teacher / (_deviation(batch.teacher) + 1e-7)
        return {**parts, "kd": replace(kd, student=student, teacher=teacher)}


class TargetSplit:
    """kd -> target (K = 2), non_target (K = V), weighted so that both add up to kd."""

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
                f"{self.name} looks for the label in 'kd', but classes are missing there",
                f"put {self.name} before top_k_mask, and let that mask 'non_target'",
            )
        # off the mask a label may be anything, even no class at all
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
        """Both parts' weights [B, T], from that of kd and the teacher's 1 - r_y, [B, T] each."""
        return weight, weight * rest


class DKD(TargetSplit):
    """The same parts under free weights: warm-up x (alpha target + beta non_target)."""

    name = "dkd"

    @by_keywords(DKDParams)
    def __init__(self, params: DKDParams, context: BuildContext) -> None:
        self.params = params

    def weigh(self, weight: Tensor, rest: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        warmup = self.params.warmup
        warm = value_at([(0.0, 0.0), (warmup, 1.0)], progress) if warmup else 1.0
        return weight * (warm * self.params.alpha), weight * (warm * self.params.beta)


class DeepKDSplitter:
    """target_split, then the dynamic top-k mask on non_target."""

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
            f"{splitter} needs the part 'kd', but it comes after a splitter that left only "
            + ", ".join(f"'{name}'" for name in names),
            f"put {splitter} first, or leave one of the two out",
        )


def _deviation(logits: Tensor) -> Tensor:
    """The standard deviation [..., 1] over the classes that are not excluded.

    Excluded ones would drown it. They stand at the others' mean here, where they add nothing.
    """
    kept = logits > LOG_ZERO
    count = kept.sum(-1, keepdim=True)
    mean = (logits * kept).sum(-1, keepdim=True) / count
    spread = logits.where(kept, mean).std(-1, keepdim=True)
    return spread * ((logits.shape[-1] - 1) / (count - 1).clamp(min=1)).sqrt()


def _cut(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The label against the rest as [log-odds, 0] [B, T, 2], and the rest [B, T, V].

    In log-odds, z_y - logsumexp of the other z, nothing underflows where the label's probability
    is next to 0 or 1; from probabilities log(1 - q_y) would be -inf.
    """
    rest = logits.scatter(-1, label, LOG_ZERO)
    odds = logits.gather(-1, label) - rest.logsumexp(-1, keepdim=True)
    return torch.cat([odds, torch.zeros_like(odds)], -1), rest
