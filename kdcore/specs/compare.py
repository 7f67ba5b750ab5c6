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
    "job": "all arms are of the base's job",
    "run": "each run has its folder in the comparison's",
    "seed": "seeds: each arm runs once with each",
    "data.heldout": "arms that are measured on other rows cannot be compared: base.data.heldout",
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
        _try(info.data["base"], changes, info, "what an arm cannot be")
    return changes


def _grid(grid: dict[str, list[Any]], info: ValidationInfo) -> dict[str, list[Any]]:
    """Raises the errors of any arm at any point, as if they stood in the grid."""
    for path in grid:
        inside = next((other for other in grid if other.startswith(f"{path}.")), None)
        if inside:
            raise ValueError(f"{inside} is inside {path}, which has values too: leave out either")
    _refuse_own(nested(dict.fromkeys(grid)))
    size = math.prod(map(len, grid.values()))
    if size > MOST_POINTS:
        raise ValueError(
            f"its combinations are {size:,}, each a run of every arm: give fewer values "
            f"(at most {MOST_POINTS:,} combinations)"
        )
    known = info.data if "base" in info.data else {}  # else that is the mistake to tell
    for arm, changes in known.get("arms", {}).items():
        twice = [path for path in grid if _has(changes, path)]
        if twice:
            raise ValueError(
                f"arm '{arm}' sets {twice[0]}, which the grid chooses for it: leave out either"
            )
        own = changed(known["base"], changes, info.context)
        for point in points(grid):
            _try(own, nested(point), info, f"what arm '{arm}' cannot be")
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
            raise ValueError(f"{path} is the comparison's own: {why}")


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
    run: Path = Field(Path("runs/compare"), description="the folder of the comparison")
    base: Annotated[
        Annotated[DistillSpec, Tag("distill")] | Annotated[TrainDrafterSpec, Tag("train-drafter")],
        Discriminator(_job),
        AfterValidator(_measured_once),
    ] = Field(description="what all arms share: a distill spec or, with its job, a train-drafter's")
    arms: dict[Name, Annotated[dict[str, Any], AfterValidator(_arm)]] = Field(
        description="name of each arm -> the fields in which it differs from base"
    )
    baseline: str | None = Field(
        None, description="the arm that the others are compared with; by default the first"
    )
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="each arm runs once with each")
    grid: Grid = Field(
        {},
        description="dotted path of a field -> its values; each arm gets its own best of all "
        "combinations",
    )
    validation: SourceChoice | None = Field(
        None, description="the rows that a grid's best is chosen on, and that are not reported"
    )
    choose_by: str | None = Field(
        None, description="the figure that it is chosen by; by default the first that there is"
    )
    trials: PositiveInt = Field(
        1,
        description="how often each arm is tried at each point, with seeds that `seeds` does not "
        "have; the mean chooses",
    )
    controls: bool = Field(
        False,
        description="beside each arm with one gate: random at its acceptance rate, uniform at its "
        "mean weight, and the gate inverted",
    )
    draws: PositiveInt = Field(1000, description="of the paired bootstrap over held-out rows")

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
            raise ValueError("a comparison measures held-out rows: set base.data.heldout")
        if not self.arms:
            raise ValueError("there is no arm: write arms: {its name: {the fields it changes}}")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"the baseline is no arm: {nearest(self.baseline, self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in seeds: remove one of them")
        return self

    @model_validator(mode="after")
    def _chooses_on_other_rows(self) -> CompareSpec:
        if self.grid and self.validation is None:
            raise ValueError(
                "what a grid chooses must not be chosen on the rows that are reported: set "
                "validation"
            )
        if not self.grid and (self.validation or self.choose_by or self.trials > 1):
            raise ValueError("validation, choose_by and trials choose in a grid: set grid")
        if self.validation and self.base.data.heldout:
            same = self.validation.dump() == self.base.data.heldout.dump()
            if same:
                raise ValueError("validation has the rows that are reported: name others")
        return self
