"""A comparison, as data: what is shared, in what the arms differ, and what each may choose."""

from __future__ import annotations

import math
from itertools import count, islice, product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kdcore.errors import nearest
from kdcore.method.choice import PARAMS_ERROR, SourceChoice
from kdcore.specs.distill import DistillSpec
from kdcore.specs.fields import Name, Seed, SpecModel
from kdcore.specs.train_drafter import TrainDrafterSpec

Trained = TypeVar("Trained", bound=SpecModel)
Point: TypeAlias = dict[str, Any]
"""Dotted path of a field -> its value there."""

OWN = {
    "job": "all arms run the job of base",
    "run": "each run gets a folder inside the comparison's run folder",
    "seed": "to set the seeds of all arms, use the field seeds",
    "data.heldout": "arms can be compared only on the same held-out rows; set base.data.heldout",
}
"""What neither an arm nor a grid may set: field -> why, and what to set instead."""

MOST_POINTS = 1000
"""Of a grid: each is validated and is a run of every arm."""


def _job(given: Any) -> str:
    """A base that names no job distils."""
    job = given.get("job") if isinstance(given, dict) else getattr(given, "job", None)
    return "train-drafter" if job == "train-drafter" else "distill"


def _merged(base: Any, changes: Any) -> Any:
    """Plain data with changes laid over it; a component (what has a name) is replaced whole."""
    if not (isinstance(base, dict) and isinstance(changes, dict)) or "name" in changes:
        return changes
    both = base.keys() | changes.keys()
    return {
        key: _merged(base.get(key), changes[key]) if key in changes else base[key] for key in both
    }


def changed(
    base: Trained, changes: dict[str, Any], context: dict[str, Any] | None = None
) -> Trained:
    """A spec with changes laid over it.

    Raises pydantic.ValidationError.
    """
    merged = _merged(base.model_dump(mode="json"), changes)
    return type(base).model_validate(merged, context=context)


def nested(point: Point) -> dict[str, Any]:
    """``{"a.b": 1}`` as the changes ``{"a": {"b": 1}}``."""
    changes: dict[str, Any] = {}
    for path, value in point.items():
        into = changes
        *outer, last = path.split(".")
        for key in outer:
            into = into.setdefault(key, {})
        into[last] = value
    return changes


def _measured_once(base: DistillSpec | TrainDrafterSpec) -> DistillSpec | TrainDrafterSpec:
    """Not before its training, unless it says so itself: no table of a comparison shows that."""
    evaluation = base.evaluation
    if "before" in evaluation.model_fields_set:
        return base
    return base.model_copy(update={"evaluation": evaluation.model_copy(update={"before": False})})


def points(grid: dict[str, list[Any]]) -> list[Point]:
    """Every combination of a grid's values; of an empty one, the one that changes nothing."""
    return [dict(zip(grid, each, strict=True)) for each in product(*grid.values())]


def _arm(changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Raises the errors of the spec that the changes make, as if they stood where the arm does."""
    _refuse_own(changes)
    if "base" in info.data:
        _try(info.data["base"], changes, info, "an arm with an invalid value")
    return changes


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
    for arm, changes in known.get("arms", {}).items():
        twice = [path for path in grid if _has(changes, path)]
        if twice:
            raise ValueError(
                f"arm '{arm}' sets {twice[0]}, which the grid sets too: remove one of them"
            )
        own = changed(known["base"], changes, info.context)
        for point in points(grid):
            _try(own, nested(point), info, f"arm '{arm}' with an invalid value")
    return grid


def _try(base: Any, changes: dict[str, Any], info: ValidationInfo, what: str) -> None:
    try:
        changed(base, changes, info.context)
    except ValidationError as inner:
        errors = {"errors": inner.errors(include_url=False), "model": type(base)}
        raise PydanticCustomError(PARAMS_ERROR, "{what}", errors | {"what": what}) from inner


def _refuse_own(changes: dict[str, Any]) -> None:
    for path, why in OWN.items():
        if _has(changes, path):
            raise ValueError(f"{path} cannot be set here: {why}")


def _has(changes: Any, path: str) -> bool:
    """Whether changes set a field, or what is inside it."""
    for key in path.split("."):
        if not isinstance(changes, dict) or key not in changes:
            return False
        changes = changes[key]
    return True


Grid: TypeAlias = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]], AfterValidator(_grid)
]


class CompareSpec(SpecModel):
    """Train by several methods, each with several seeds, and compare what comes out."""

    job: Literal["compare"]
    run: Path = Field(Path("runs/compare"), description="folder for the results of the comparison")
    base: Annotated[
        Annotated[DistillSpec, Tag("distill")] | Annotated[TrainDrafterSpec, Tag("train-drafter")],
        Discriminator(_job),
        AfterValidator(_measured_once),
    ] = Field(
        description="spec shared by all arms: a distill spec, or a train-drafter spec with job: "
        "train-drafter"
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
        description="dotted path of a field -> values to try; each arm keeps the combination "
        "that is best for it",
    )
    validation: SourceChoice | None = Field(
        None,
        description="rows used to choose the best grid point; not used for the reported results",
    )
    choose_by: str | None = Field(
        None,
        description="metric used to choose the best grid point (default: the first one measured)",
    )
    trials: PositiveInt = Field(
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
    draws: PositiveInt = Field(
        1000, description="number of resamples of the paired bootstrap over held-out rows"
    )

    @property
    def points(self) -> list[Point]:
        """What each arm is tried at."""
        return points(self.grid)

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
            raise ValueError(f"baseline does not name an arm: {nearest(self.baseline, self.arms)}")
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
