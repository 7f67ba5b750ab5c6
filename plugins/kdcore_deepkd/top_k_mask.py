"""The dynamic top-k mask: of one part, only the teacher's k best classes (arXiv 2505.15133)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdcore import BuildContext, LogitBatch, Part, by_keywords
from kdcore.errors import UserError, nearest
from kdcore.method.schedule import value_at
from kdcore_deepkd.params import CurriculumParams, TopKMaskParams


class TopKMask:
    """Drops every other class from teacher and student, before the softmax.

    The dropped ones are gone, not set to log zero: the part comes out with K = k, so that their
    gradient is exactly zero and a vocabulary of 49k costs what its k best classes do. Classes
    that were excluded before rank last, so they are kept only when fewer than k others exist.
    """

    @by_keywords(TopKMaskParams)
    def __init__(self, params: TopKMaskParams, context: BuildContext) -> None:
        self.params = params

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if self.params.part not in names:
            raise UserError(
                f"top_k_mask is to mask the part '{self.params.part}', which no splitter before "
                "it makes",
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
    """How many at a progress in [0, 1], from 1 to all of the classes."""
    if curriculum.unit == "share":
        points = [(place, share * classes) for place, share in curriculum.points()]
        k = value_at(points, progress)
    else:
        # the end is met at progress 1, not when an oversized number would cross it
        points = [(place, math.log(min(k, classes))) for place, k in curriculum.points()]
        k = math.exp(value_at(points, progress))
    return max(1, round(k))
