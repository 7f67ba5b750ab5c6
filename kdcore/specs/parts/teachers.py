"""What a spec says of the teachers of a student, where one is served, cached, or one of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag

from kdcore.method.schedule import Points, value_at
from kdcore.specs.parts.endpoint import Address, EndpointSpec, kind_of_teacher
from kdcore.specs.parts.fields import (
    MOST_WIDE,
    SHARDED,
    Count,
    FolderOrUrl,
    ModelSpec,
    Name,
    SpecModel,
)
from kdcore.specs.parts.on_policy import sampled_with_teacher
from kdcore.specs.parts.schedule import Schedule


class ServedTeacherSpec(EndpointSpec):
    """A teacher behind one or several servers, which score the rows while the student trains."""

    k: Annotated[int, Field(ge=2, le=MOST_WIDE)] = Field(
        20,
        description="number of the teacher's most likely classes that are requested for each "
        "position; the others share the remaining probability (vLLM: at most --max-logprobs)",
    )
    replicas: list[Address] = Field(
        [],
        description="base URLs of further servers of the same model, which share the requests",
    )
    concurrency: Count = Field(32, description="maximum number of concurrent requests")
    prefetch: Annotated[int, Field(ge=0, le=MOST_WIDE)] = Field(
        4, description="number of steps whose rows are requested ahead of the training"
    )


class CachedTeacherSpec(SpecModel):
    """A teacher of which only a teacher cache is there."""

    cache: FolderOrUrl = Field(
        description="folder or URL of a teacher cache that has the rows which it teaches (see "
        "`kdcore cache build`)"
    )


def origin_of(teacher: ModelSpec | ServedTeacherSpec | CachedTeacherSpec) -> str:
    """The model, server or folder of a teacher, in the words of a report."""
    if isinstance(teacher, CachedTeacherSpec):
        return f"cache {teacher.cache}"
    if isinstance(teacher, ServedTeacherSpec):
        addresses = ", ".join([teacher.endpoint, *teacher.replicas])
        return f"the top {teacher.k} of {teacher.model} at {addresses}"
    return teacher.model


def _kind(given: Any) -> str:
    fields = given if isinstance(given, dict) else getattr(given, "__dict__", ())
    return "a cache" if "cache" in fields else kind_of_teacher(given)


TeacherSpec: TypeAlias = Annotated[
    Annotated[ModelSpec, Tag("a model")]
    | Annotated[ServedTeacherSpec, Tag("an endpoint")]
    | Annotated[CachedTeacherSpec, Tag("a cache")],
    Discriminator(_kind),
]
"""One of several teachers."""
TeachersSpec: TypeAlias = dict[Name, TeacherSpec]
Weights: TypeAlias = dict[Name, Schedule]

_INSTEAD = {
    "teacher": "remove teacher, or make it one of teachers",
    "data.teacher_cache": "name each cache in teachers: {NAME: {cache: FOLDER}}",
    "student.model: teacher": "set student.model to a model",
    "student.model: new without student.tokenizer": "set student.tokenizer",
    "data.responses.by: teacher": "generate the responses of each teacher first (kdcore "
    "generate-data)",
    "data.on_policy with a cached teacher": "remove data.on_policy, or name a model or an endpoint "
    "in place of the cache",
    "method.alignment": "choose teachers with the student's tokenizer",
    "training.packing": "replace it by training.group_by_length: true",
    "device: sharded": "cache that teacher first (kdcore cache build), or set device: auto",
}
"""What does not work with several teachers -> the cure; else, to remove it."""


def refuse_with_several(spec: Any) -> None:
    """Check that a spec with several teachers sets nothing that needs a single one.

    Args:
        spec: The distill spec.

    Raises:
        ValueError: It does.
    """
    on_policy, student, teachers = spec.data.on_policy, spec.student, spec.teachers.values()
    cached = any(isinstance(each, CachedTeacherSpec) for each in teachers)
    asked = {
        "teacher": spec.teacher,
        "data.teacher_cache": spec.data.teacher_cache,
        "student.model: teacher": student.model == "teacher",
        "student.model: new without student.tokenizer": (
            student.model == "new" and student.tokenizer is None
        ),
        "data.responses.by: teacher": spec.data.responses.by == "teacher",
        **sampled_with_teacher(on_policy),
        "data.on_policy with a cached teacher": on_policy and cached,
        "method.alignment": spec.method.alignment,
        "method.matchers": spec.method.matchers,
        "training.packing": spec.training.packing,
        "device: sharded": any(getattr(each, "device", None) == SHARDED for each in teachers),
    }
    for field in (field for field, wants in asked.items() if wants):
        cure = _INSTEAD.get(field, f"remove {field.partition(':')[0]}")
        raise ValueError(f"several teachers (teachers) do not support {field}: {cure}")


def refuse_weights(teachers: Mapping[str, Any], weights: Mapping[str, float | Points]) -> None:
    """Check the weights of teachers in their average.

    Args:
        teachers: The teachers by name.
        weights: Their weights.

    Raises:
        ValueError: A weight belongs to no teacher or is negative, or all are 0 at some time.
    """
    for name, weight in weights.items():
        if name not in teachers:
            raise ValueError(
                f"teacher_weights sets a weight for unknown teacher '{name}': name one of "
                f"{', '.join(teachers) or '(teachers is empty)'}"
            )
        if min(values_of(weight)) < 0:
            raise ValueError(f"teacher_weights.{name} must be at least 0 at every point")
    points = {place for each in weights.values() if isinstance(each, list) for place, _ in each}
    for place in sorted({0.0, 1.0, *points}):
        if weights and not any(value_at(each, place) for each in weights.values()):
            raise ValueError(
                f"teacher_weights are all 0 at progress {place:g}: raise one of them there"
            )


def values_of(schedule: float | Points) -> list[float]:
    """The values of a schedule at its points."""
    return [value for _, value in schedule] if isinstance(schedule, list) else [schedule]
