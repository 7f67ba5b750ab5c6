"""A comparison, as data: what is shared, in what the arms differ, and what each may choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from kdcore.components.choice import PARAMS_ERROR, USER_MESSAGE, SourceChoice
from kdcore.components.job import Job
from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError, nearest
from kdcore.specs.distill import DistillSpec
from kdcore.specs.json_schema import JOB_REFERENCE
from kdcore.specs.parts.changes import Point, changed, has, nested, plain, points, with_paths
from kdcore.specs.parts.fields import Count, Name, RunFolder, Seed, SpecModel
from kdcore.specs.parts.training import KeptResponsesSpec, RowsSpec


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


OWN = {
    "job": "all arms run the job of base",
    "run": "each run gets a folder inside the comparison's run folder",
    "seed": "to set the seeds of all arms, use the field seeds",
    "data.heldout": "arms can be compared only on the same held-out rows; set base.data.heldout",
}
"""What neither an arm nor a grid may set: field -> why, and what to set instead."""

ROUNDING = {"dtype", "attention", "device", "trust_remote_code"}
"""Fields of a model that change its answers by rounding at most."""
MOST_POINTS = 1000
"""Of a grid: each is validated and is a run of every arm."""


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
            raise _wrong_job(named, wrong) from wrong
        try:
            spec: Any = model.model_validate(value, context=info.context)
        except ValidationError as inner:
            raise _errors_of(inner.errors(include_url=False), model) from inner
        if not isinstance(spec.data, RowsSpec):
            cause = f"job '{job.name}' is broken: the data of {job.model} is not a RowsSpec"
            cure = "ask its author to make it a kdcore.specs.parts.training.RowsSpec"
            raise _wrong_job(named, UserError(cause, cure))
        return _measured_once(spec)


def _comparable(name: str, registry: Registry) -> Job:
    """Raises UserError for a job that is not there, or that cannot be a cell."""
    job = registry.job(name)
    if not job.comparable:
        known = ", ".join(job.name for job, _ in registry.jobs() if job.comparable)
        raise UserError(f"job '{name}' cannot be compared", f"choose one that can: {known}")
    return job


def _wrong_job(named: Any, wrong: UserError) -> PydanticCustomError:
    """An error that stands where the base names its job."""
    return _wrong("job", named, wrong.cause, wrong.cure, DistillSpec)


def _wrong(field: str, value: Any, cause: str, cure: str, model: type[Any]) -> PydanticCustomError:
    """An error that stands where a spec of a cell has a field."""
    cause = cause.encode("utf-8", "backslashreplace").decode()  # it may name what is no text
    told = {"type": USER_MESSAGE, "msg": cause, "ctx": {"cause": cause, "cure": cure}}
    return _errors_of([told | {"loc": tuple(field.split(".")), "input": value}], model)


def _errors_of(errors: list[Any], model: type[BaseModel]) -> PydanticCustomError:
    return PydanticCustomError(PARAMS_ERROR, "invalid base", {"errors": errors, "model": model})


def _measured_once(base: Any) -> CellSpec:
    """Not before its training, unless it says so itself: no table of a comparison shows that."""
    evaluation: Any = getattr(base, "evaluation", None)
    if hasattr(evaluation, "before") and "before" not in evaluation.model_fields_set:
        once = evaluation.model_copy(update={"before": False})
        base = base.model_copy(update={"evaluation": once})
    spec: CellSpec = base
    return spec


def _arm(changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Raises the errors of the spec that the changes make, as if they stood where the arm does."""
    _refuse_own(changes)
    if "base" not in info.data:
        return changes
    read = _try(info.data["base"], changes, info, "an arm with an invalid value")
    _refuse_other_answers(info.data["base"], read)
    resolved: dict[str, Any] = with_paths(changes, plain(read))
    return resolved


def _grid(grid: dict[str, list[Any]], info: ValidationInfo) -> dict[str, list[Any]]:
    """Raises the errors of any arm at any point, as if they stood in the grid."""
    for path in grid:
        inside = next((other for other in grid if other.startswith(f"{path}.")), None)
        if inside:
            raise ValueError(
                f"both {path} and {inside}, which is part of it, have values: remove one of them"
            )
    _refuse_own(nested(dict.fromkeys(grid)))
    size = math.prod(map(len, grid.values()))
    if size > MOST_POINTS:
        raise ValueError(
            f"the grid has {size:,} combinations, and every arm runs each of them: reduce it "
            f"to at most {MOST_POINTS:,}"
        )
    known = info.data if "base" in info.data else {}  # else that is the mistake to tell
    arms: list[Any] = []
    having: dict[str, Any] = {}
    for arm, changes in known.get("arms", {}).items():
        twice = [path for path in grid if has(changes, path)]
        if twice:
            raise ValueError(
                f"arm '{arm}' sets {twice[0]}, which the grid sets too: remove one of them"
            )
        own = changed(known["base"], changes, info.context)
        suits = _suiting(own, grid, info)
        arms.append(own)
        having = dict.fromkeys(suits, own) | having
        for point in points(suits):
            made = _try(own, nested(point), info, f"arm '{arm}' with an invalid value")
            _refuse_other_answers(own, made)
    if not arms:
        return grid
    for path in (path for path in grid if path not in having):
        for spec in (known["base"], arms[0]):  # base need not be an arm
            _try(spec, nested({path: grid[path][0]}), info, "an unknown field")
    return {
        path: [_at_point(having[path], path, value, info) for value in values]
        for path, values in grid.items()
    }


def _suiting(arm: Any, grid: dict[str, list[Any]], info: ValidationInfo | None) -> dict[str, Any]:
    """The part of a grid whose fields the spec of an arm has, at some of the grid's values.

    A field may exist only beside some values of others: a parameter of a component that the grid
    names. It is then part of all combinations, and those in which it does not exist are refused.
    """
    suits: dict[str, Any] = {}
    seen = -1
    while len(suits) > seen:
        seen = len(suits)
        for path in [path for path in grid if path not in suits]:
            alone = {path: grid[path]}
            around = {at: values for at, values in suits.items() if _is_around(at, path)}
            tried = chain(points(alone), points(around | alone) if around else ())
            if not all(_lacks(arm, point, info) for point in tried):
                suits |= alone
    return {path: values for path, values in grid.items() if path in suits}


def _is_around(field: str, path: str) -> bool:
    """Whether a field lies in a mapping around that of a path, whose fields it may decide."""
    return path.startswith(field[: field.rfind(".") + 1])


def _lacks(arm: Any, point: Point, info: ValidationInfo | None) -> bool:
    """Whether the spec of an arm lacks a field, or an item of a list, that a point sets."""
    try:
        _try(arm, nested(point), info, "")
    except ValueError as fault:
        return _lacks_a_field(fault)
    return False


def _lacks_a_field(fault: Any) -> bool:
    """Whether an error of `_try`, or one of its list of errors, is that a field is unknown."""
    if isinstance(fault, PydanticCustomError):
        return any(map(_lacks_a_field, (fault.context or {}).get("errors", ())))
    if isinstance(fault, dict):
        inner = fault.get("ctx", {}).get("errors", ())
        return fault["type"] == "extra_forbidden" or any(map(_lacks_a_field, inner))
    return True  # an item that a list lacks


def _at_point(base: Any, path: str, value: Any, info: ValidationInfo) -> Any:
    """A value of a grid, with its paths resolved; as it is if it is invalid on its own."""
    changes = nested({path: value})
    try:
        made = with_paths(changes, plain(changed(base, changes, info.context)))
    except ValidationError:
        return value
    for key in path.split("."):
        made = made[key]
    return made


def _try(base: Any, changes: dict[str, Any], info: ValidationInfo | None, what: str) -> Any:
    try:
        return changed(base, changes, info.context if info else None)
    except ValidationError as inner:
        errors = {"errors": inner.errors(include_url=False), "model": type(base)}
        raise PydanticCustomError(PARAMS_ERROR, "{what}", errors | {"what": what}) from inner


def _refuse_own(changes: dict[str, Any]) -> None:
    for path, why in OWN.items():
        if has(changes, path):
            raise ValueError(f"{path} cannot be set here: {why}")


def _refuse_other_answers(base: CellSpec, made: CellSpec) -> None:
    """Raises an error for a cell whose held-out prompts would have other responses."""
    ours, theirs = _answered_with(made), _answered_with(base)
    field = next((each for each in ours | theirs if ours.get(each) != theirs.get(each)), None)
    if field is not None:
        cause = (
            "this also decides the responses to the held-out prompts, and arms can be compared "
            "only on the same held-out rows"
        )
        cure = (
            "set it in base; to compare responses, set base.data.responses.by: dataset, and name "
            "in data.train of each arm a file that kdcore generate-data wrote"
        )
        raise _wrong(field, ours.get(field), cause, cure, type(made))


def _answered_with(spec: Any) -> dict[str, Any]:
    """What decides the responses of a cell besides its prompts: dotted field -> value."""
    responses = getattr(spec.data, "responses", None)
    by = getattr(responses, "by", "dataset")
    found = {"data.responses.by": by}
    if by != "dataset" and isinstance(responses, KeptResponsesSpec):
        found |= {f"data.responses.{name}": each for name, each in responses.deciding.items()}
        model = getattr(spec, by, None)
        said = model.model_dump(exclude=ROUNDING) if isinstance(model, SpecModel) else {}
        found |= {f"{by}.{name}": each for name, each in said.items()}
    return found


Grid: TypeAlias = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]], AfterValidator(_grid)
]


class CompareSpec(SpecModel):
    """Train by several methods, each with several seeds, and compare what comes out."""

    job: Literal["compare"]
    run: RunFolder = Field(
        Path("runs/compare"), description="folder for the results of the comparison"
    )
    base: Annotated[CellSpec, OfComparableJob()] = Field(
        description="spec shared by all arms: a distill spec, or one of another comparable job "
        "with its job: NAME, such as train-drafter"
    )
    arms: dict[Name, Annotated[dict[str, Any], AfterValidator(_arm)]] = Field(
        description="arm name -> the fields it changes in base, by dotted path"
    )
    baseline: str | None = Field(
        None, description="arm that the others are compared with (default: the first)"
    )
    seeds: list[Seed] = Field(
        [0, 1, 2], min_length=1, description="seeds; each arm runs once with each of them"
    )
    grid: Grid = Field(
        {},
        description="dotted path of a field, or of an item of a list by its index (e.g. "
        "method.gates.0.k) -> values to try; each arm keeps the combination that is best for it; "
        "an arm whose spec lacks a field at all values of the grid is not tried over that field",
    )
    validation: SourceChoice | None = Field(
        None,
        description="rows used to choose the best grid point; not used for the reported results",
    )
    choose_by: str | None = Field(
        None,
        description="metric used to choose the best grid point (default: the first one measured)",
    )
    trials: Annotated[Count, Field(le=1000)] = Field(
        1,
        description="runs per arm and grid point, with seeds not in `seeds`; the point with "
        "the best mean is chosen",
    )
    controls: bool = Field(
        False,
        description="add three controls for each arm with one gate: a random gate with its "
        "acceptance rate, a uniform gate with its mean weight, and the inverted "
        "gate",
    )
    draws: Annotated[Count, Field(le=10**6)] = Field(
        1000, description="number of resamples of the paired bootstrap over held-out rows"
    )

    @cached_property
    def grids(self) -> dict[str, dict[str, list[Any]]]:
        """Arm -> the part of the grid that it is tried at: the fields that its spec has."""
        arms = {name: changed(self.base, arm) for name, arm in self.arms.items()}
        return {name: _suiting(arm, self.grid, None) for name, arm in arms.items()}

    def lacks(self, arm: str) -> list[str]:
        """The fields of the grid that the spec of an arm lacks."""
        return [path for path in self.grid if path not in self.grids[arm]]

    def points_of(self, arm: str) -> list[Point]:
        """What an arm is tried at: every combination, or one that changes nothing."""
        return points(self.grids[arm])

    def at_point(self, arm: str, point: int) -> Any:
        """The spec of an arm at one of its points, by number."""
        own = changed(self.base, self.arms[arm])
        return changed(own, nested(self.points_of(arm)[point]))

    @property
    def trial_seeds(self) -> list[int]:
        """Those of what only chooses: none of `seeds`, so that no lucky run is reported."""
        own = (seed for seed in count() if seed not in self.seeds)
        return list(islice(own, self.trials))

    @model_validator(mode="after")
    def _can_be_compared(self) -> CompareSpec:
        if self.base.data.heldout is None:
            raise ValueError("a comparison needs held-out rows: set base.data.heldout")
        if not self.arms:
            raise ValueError("arms is empty: write arms: {NAME: {FIELD: VALUE}}")
        if self.baseline is not None and self.baseline not in self.arms:
            cure = nearest(self.baseline, self.arms)
            raise ValueError(f"baseline {self.baseline!r} does not name an arm: {cure}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds contains the same seed twice: remove one of them")
        return self

    @model_validator(mode="after")
    def _chooses_on_other_rows(self) -> CompareSpec:
        if self.grid and self.validation is None:
            raise ValueError(
                "a grid needs rows of its own to choose the best point on: set validation"
            )
        if not self.grid and (self.validation or self.choose_by or self.trials > 1):
            raise ValueError(
                "validation, choose_by and trials have no effect without a grid: set grid"
            )
        if self.validation and self.base.data.heldout:
            same = self.validation.dump() == self.base.data.heldout.dump()
            if same:
                raise ValueError(
                    "validation uses the same rows as base.data.heldout: choose different rows"
                )
        return self
