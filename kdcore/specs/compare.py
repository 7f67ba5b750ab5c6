"""A comparison, as data: what is shared, in what the arms differ, and what each may choose."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from kdcore.components.choice import SourceChoice
from kdcore.errors import nearest
from kdcore.specs.comparable import CellSpec, OfComparableJob
from kdcore.specs.grid import Place, as_json, cells_of, refuse_unknown, resolve_paths, suiting
from kdcore.specs.parts.changes import (
    Keys,
    NoSuchItem,
    Places,
    Point,
    changed,
    has,
    nested,
    places_of,
    plain,
    points,
    with_paths,
)
from kdcore.specs.parts.fields import Count, Name, RunFolder, Seed, SpecModel
from kdcore.specs.parts.inner_errors import errors_of, mistake_at
from kdcore.specs.parts.training import KeptResponsesSpec

OWN = {
    "job": "remove it: all arms run the job of base",
    "run": "remove it: each run gets a folder inside the comparison's run folder",
    "seed": "remove it, and set the field seeds, which are those of all arms",
    "data.heldout": "set base.data.heldout: arms can be compared only on the same held-out rows",
}
"""What neither an arm nor a grid may set: field -> what to do instead."""

ROUNDING = {"dtype", "attention", "device", "trust_remote_code"}
"""Fields of a model that change its answers by rounding at most."""
MOST_POINTS = 1000
"""Of a grid: each is validated and is a run of every arm."""
_REMOVE_ONE = "remove one of them"


def _arm(changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Raises the errors of the spec that the changes make, as if they stood where the arm does."""
    _refuse_own(changes)
    if "base" not in info.data:
        return changes
    base = info.data["base"]
    try:
        read = changed(base, changes, info.context)
    except NoSuchItem as lack:
        raise mistake_at(lack.keys, lack.cause, lack.cure) from lack
    except ValidationError as inner:
        raise errors_of(inner, type(base)) from inner
    _refuse_other_answers(base, read, "base")
    resolved: dict[str, Any] = with_paths(changes, plain(read))
    return resolved


def _grid(grid: dict[str, list[Any]], info: ValidationInfo) -> dict[str, list[Any]]:
    """Raises the errors of any arm at any point, as if they stood at the values of the grid."""
    for path in grid:
        inside = next((other for other in grid if other.startswith(f"{path}.")), None)
        if inside:
            cause = f"both {path} and {inside}, which is part of it, have values"
            raise mistake_at((inside,), cause, _REMOVE_ONE)
    size = math.prod(map(len, grid.values()))
    if size > MOST_POINTS:
        raise ValueError(
            f"the grid has {size:,} combinations, and every arm runs each of them: reduce it "
            f"to at most {MOST_POINTS:,}"
        )
    for path, values in grid.items():
        for index, value in enumerate(values):
            _refuse_own(nested({path: value}), (path, index))
    known = info.data if "base" in info.data else {}  # else that is the mistake to tell
    arms: list[Any] = []
    resolved: dict[str, list[Any]] = {}
    for arm, changes in known.get("arms", {}).items():
        twice = [path for path in grid if has(changes, path)]
        if twice:
            cause = f"arm '{arm}' sets {twice[0]}, which the grid sets too"
            raise mistake_at((twice[0],), cause, _REMOVE_ONE)
        own = changed(known["base"], changes, info.context)
        suits = suiting(own, grid, info.context)
        arms.append(own)
        resolved = {path: [*values] for path, values in suits.items()} | resolved
        for made, place in cells_of(arm, own, known["base"], suits, info.context):
            _refuse_other_answers(own, made, f"arm '{arm}'", place)
            resolve_paths(resolved, suits, made, place)
    if not arms:
        return grid
    for path in (path for path in grid if path not in resolved):
        for spec in (known["base"], arms[0]):  # base need not be an arm
            refuse_unknown(spec, path, grid[path], info.context)
    return {path: resolved[path] for path in grid}


def _refuse_own(changes: dict[str, Any], at: Keys = ()) -> None:
    """Raises an error for what neither an arm nor a grid may set, at its keys or the given ones."""
    for path, cure in OWN.items():
        if has(changes, path):
            raise mistake_at(at or tuple(path.split(".")), f"{path} cannot be set here", cure)


def _refuse_other_answers(
    base: CellSpec, made: CellSpec, whose: str, place: Place = lambda field: field
) -> None:
    """Raises an error for a cell whose held-out prompts would have other responses."""
    ours, theirs = _answered_with(made), _answered_with(base)
    field = next((each for each in ours | theirs if ours.get(each) != theirs.get(each)), None)
    if field is None:
        return
    here, there = (as_json(each.get(field)) for each in (ours, theirs))
    cause = (
        f"this also decides the responses to the held-out prompts ({here}, but {there} in "
        f"{whose}), and arms can be compared only on the same held-out rows"
    )
    by = "" if theirs["data.responses.by"] == "dataset" else "set base.data.responses.by: dataset, "
    cure = (
        f"set it in base alone; or {by}name rows with responses in base.data.heldout, and in "
        "data.train of each arm a file that kdcore generate-data wrote"
    )
    raise mistake_at(place(tuple(field.split("."))), cause, cure, ours.get(field))


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


def _named_by_paths(grid: Any) -> Any:
    """Raises an error for a grid that is nested as an arm is."""
    for key, values in grid.items() if isinstance(grid, dict) else ():
        if isinstance(values, dict):
            inner = next(map(str, values), "FIELD")
            cure = f"name the field by its dotted path: grid: {{{key}.{inner}: [VALUE, VALUE]}}"
            raise mistake_at((key,), "must be a list of values, not a mapping", cure)
    return grid


Grid: TypeAlias = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]],
    BeforeValidator(_named_by_paths),
    AfterValidator(_grid),
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
        description="arm name -> the fields it changes in base, nested as they are there; {} "
        "changes none"
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
        return {name: suiting(arm, self.grid, None) for name, arm in arms.items()}

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

    def places_of(self, arm: str, point: int) -> Places:
        """Where the values of a point stand: the keys of a field -> those in the comparison."""
        places = places_of(self.grids[arm])[point]
        return {field: ("grid", *place) for field, place in places.items()}

    @property
    def trial_seeds(self) -> list[int]:
        """Those of what only chooses: none of `seeds`, so that no lucky run is reported."""
        own = (seed for seed in count() if seed not in self.seeds)
        return list(islice(own, self.trials))

    @model_validator(mode="after")
    def _can_be_compared(self) -> CompareSpec:
        if self.base.data.heldout is None:
            heldout = ("base", "data", "heldout")
            raise mistake_at(heldout, "a comparison needs held-out rows", "set base.data.heldout")
        if not self.arms:
            raise mistake_at(("arms",), "arms is empty", "write arms: {NAME: {FIELD: VALUE}}")
        if self.baseline is not None and self.baseline not in self.arms:
            cause = f"baseline {self.baseline!r} does not name an arm"
            raise mistake_at(("baseline",), cause, nearest(self.baseline, self.arms))
        twice = next((n for n, seed in enumerate(self.seeds) if seed in self.seeds[:n]), None)
        if twice is not None:
            raise mistake_at(("seeds", twice), "seeds contains the same seed twice", _REMOVE_ONE)
        return self

    @model_validator(mode="after")
    def _chooses_on_other_rows(self) -> CompareSpec:
        if self.grid and self.validation is None:
            cause = "a grid needs rows of its own to choose the best point on"
            raise mistake_at(("grid",), cause, "set validation")
        chooses = {
            "validation": self.validation is not None,
            "choose_by": self.choose_by is not None,
            "trials": self.trials > 1,
        }
        if not self.grid and (useless := next((n for n, used in chooses.items() if used), None)):
            cause = f"{useless} has no effect without a grid"
            raise mistake_at((useless,), cause, "set grid, or remove this line")
        if self.validation and self.base.data.heldout:
            same = self.validation.dump() == self.base.data.heldout.dump()
            if same:
                cause = "validation uses the same rows as base.data.heldout"
                raise mistake_at(("validation",), cause, "choose different rows")
        return self
