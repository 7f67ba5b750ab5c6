"""What `kdcore check` says of several teachers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kdcore.method.schedule import Points
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import origin_of
from kdcore.training.teachers.row_weights import RowWeights


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What one of several teachers teaches.

    Attributes:
        name: Its name in the spec.
        origin: Its model, server or cache.
        alone: Number of training rows that it teaches alone.
        averaged: Number of training rows that it teaches together with others.
        weight: Its scheduled weight in the average of rows that name no teacher.
    """

    name: str
    origin: str
    alone: int
    averaged: int
    weight: float | Points


def teachers_of(spec: DistillSpec, examples: Iterable[Any]) -> tuple[TeacherFacts, ...]:
    """Count who of several teachers teaches how many rows.

    Args:
        spec: The spec.
        examples: The training examples.

    Returns:
        The facts of each teacher.

    Raises:
        UserError: An example names an unknown teacher.
    """
    weights = RowWeights.of(spec)
    said = [(example.id, getattr(example, "teacher", "")) for example in examples]
    weights.refuse(said)
    averages = spec.teacher_weights or dict.fromkeys(spec.teachers, 1.0)
    counts = weights.counts(each for _, each in said)
    return tuple(
        TeacherFacts(name, origin_of(each), *counts[name], averages.get(name, 0.0))
        for name, each in spec.teachers.items()
    )
