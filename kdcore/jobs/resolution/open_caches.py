"""The teacher caches that a distill spec names, opened and checked against it."""

from __future__ import annotations

from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.errors import UserError, in_field
from kdcore.method.objective import Objective
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.runs.today import pin
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import CachedTeacherSpec


@in_field("data.teacher_cache")
def open_cache(
    spec: DistillSpec, objective: Objective, models: TeacherAndStudent
) -> TeacherCache | None:
    """Open the spec's teacher cache, if any, and pin the date of its rows.

    Args:
        spec: The spec.
        objective: Its method.
        models: Its models.

    Returns:
        The cache, or None.

    Raises:
        UserError: It does not fit the spec.
    """
    if spec.data.teacher_cache is None:
        return None
    cache = TeacherCache(spec.data.teacher_cache)
    first, classes = models.answerer, models.answered_classes
    cache.refuse_other_origin(first, classes, is_teacher=models.teacher is not None)
    cache.refuse_method(objective)
    if cache.manifest.date is not None:
        pin(cache.manifest.date)
    return cache


def open_caches(
    spec: DistillSpec, objective: Objective, models: TeacherAndStudent
) -> dict[str, TeacherCache]:
    """Open the caches of several teachers, and pin the date of their rows.

    Args:
        spec: The spec.
        objective: Its method.
        models: Its models.

    Returns:
        Name -> cache.

    Raises:
        UserError: One does not fit the spec, or two have rows of different days.
    """
    caches: dict[str, TeacherCache] = {}
    for name, asked in spec.teachers.items():
        if not isinstance(asked, CachedTeacherSpec):
            continue
        with in_field(f"teachers.{name}.cache"):
            cache = TeacherCache(asked.cache)
            # its classes may be fewer or more than the student's: further ones are padding
            cache.refuse_other_origin(models.first, cache.manifest.classes, is_teacher=False)
            cache.refuse_method(objective)
        caches[name] = cache
    days = {cache.manifest.date: cache.folder for cache in caches.values()}
    if len(days) > 1:
        raise UserError(
            f"the chat template prints the date, and {' and '.join(map(str, days.values()))} were "
            "built on different days",
            "build the caches on one day",
        )
    if day := next(iter(days), None):
        pin(day)
    return caches
