"""The base of a comparison: the spec of any job that says of itself that it can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import core_schema

from kdcore.components.job import Job
from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from kdcore.specs.json_schema import JOB_REFERENCE
from kdcore.specs.parts.changes import plain
from kdcore.specs.parts.inner_errors import errors_of, mistake_at
from kdcore.specs.parts.training import RowsSpec


class CellSpec(Protocol):
    """What a comparison reads and sets of the spec of a cell, of whichever comparable job."""

    @property
    def job(self) -> str:
        """The name of the job, whose record says that it is comparable."""

    @property
    def run(self) -> Path:
        """The run folder."""

    @property
    def seed(self) -> int:
        """The seed of all that is random in it."""

    @property
    def data(self) -> RowsSpec:
        """The rows to train on, and those that are held out."""


@dataclass(frozen=True, slots=True)
class OfComparableJob:
    """Marks a `CellSpec` field: the spec of any comparable job; one that names no job distils."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(plain),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A marker that `kdcore.specs.json_schema` replaces by the specs of those jobs."""
        return {"type": "object", JOB_REFERENCE: "comparable"}

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> CellSpec:
        registry: Registry = (info.context or {}).get("registry") or installed()
        named = value.get("job") if isinstance(value, dict) else getattr(value, "job", None)
        try:
            job = _comparable("distill" if named is None else str(named), registry)
            model = job.spec
        except UserError as wrong:
            raise mistake_at(("job",), wrong.cause, wrong.cure, named) from wrong
        try:
            spec: Any = model.model_validate(value, context=info.context)
        except ValidationError as inner:
            raise errors_of(inner, model) from inner
        if not isinstance(spec.data, RowsSpec):
            cause = f"job '{job.name}' is broken: the data of {job.model} is not a RowsSpec"
            cure = "ask its author to make it a kdcore.specs.parts.training.RowsSpec"
            raise mistake_at(("job",), cause, cure, named)
        return _measured_once(spec)


def _comparable(name: str, registry: Registry) -> Job:
    """Raises UserError for a job that is not there, or that cannot be a cell."""
    job = registry.job(name)
    if not job.comparable:
        known = ", ".join(job.name for job, _ in registry.jobs() if job.comparable)
        raise UserError(f"job '{name}' cannot be compared", f"choose one that can: {known}")
    return job


def _measured_once(base: Any) -> CellSpec:
    """Not before its training, unless it says so itself: no table of a comparison shows that."""
    evaluation: Any = getattr(base, "evaluation", None)
    if hasattr(evaluation, "before") and "before" not in evaluation.model_fields_set:
        once = evaluation.model_copy(update={"before": False})
        base = base.model_copy(update={"evaluation": once})
    spec: CellSpec = base
    return spec
