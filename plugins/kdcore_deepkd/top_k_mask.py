"""Dynamic top-k mask, which keeps only the teacher's top k classes of a part (2505.15133)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdcore import BuildContext, LogitBatch, Part, by_keywords
from kdcore.errors import UserError, nearest
from kdcore.method.schedule import value_at
from kdcore_deepkd.params import CurriculumParams, TopKMaskParams


class TopKMask:
    """Splitter that removes all but the teacher's top k classes, before the softmax.

    It removes the classes instead of setting them to log zero: the part then has K = k, the
    gradient of removed classes is exactly zero, and a vocabulary of 49k costs as much as k classes.
    Classes that were already excluded rank last, so they remain only if fewer than k others exist.
    """

    @by_keywords(TopKMaskParams)
    def __init__(self, params: TopKMaskParams, context: BuildContext) -> None:
        self.params = params

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if self.params.part not in names:
            raise UserError(
                f"top_k_mask masks unknown part '{self.params.part}'",
                nearest(self.params.part, names),
            )
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        part = parts[self.params.part]
        classes = part.teacher.shape[-1]
        k = classes_kept(self.params, batch.progress, classes)
        if k == classes:
            return dict(parts)
        best = part.teacher.topk(k, dim=-1, sorted=False).indices
        kept = Part(part.student.gather(-1, best), part.teacher.gather(-1, best), part.weight)
        return {**parts, self.params.part: kept}


def classes_kept(curriculum: CurriculumParams, progress: float, classes: int) -> int:
    """Compute the number of classes to keep.

    Args:
        curriculum: Schedule of k.
        progress: Share of the training done, in [0, 1].
        classes: Number of classes of the part.

    Returns:
        A number from 1 to ``classes``.
    """
    if curriculum.unit == "share":
        points = [(place, share * classes) for place, share in curriculum.points()]
        k = value_at(points, progress)
    else:
        # capped first, so that the schedule reaches all classes at progress 1, not earlier
        points = [(place, math.log(min(k, classes))) for place, k in curriculum.points()]
        k = math.exp(value_at(points, progress))
    return max(1, round(k))
