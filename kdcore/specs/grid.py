"""The grid of a comparison: the part of it that suits an arm, and which of its values are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeAlias

from pydantic import ValidationError

from kdcore.specs.parts.changes import (
    Keys,
    NoSuchItem,
    Places,
    Point,
    changed,
    nested,
    place_in,
    places_of,
    plain,
    points,
    with_paths,
)
from kdcore.specs.parts.inner_errors import errors_of, mistake_at
from kdcore.specs.reading.mistakes import unknown_fields

Grid: TypeAlias = dict[str, list[Any]]
"""Dotted path of a field -> the values to try."""
Context: TypeAlias = dict[str, Any] | None
"""The context of a spec's validation: its folder and the registry."""
Place: TypeAlias = Callable[[Keys], Keys]
"""Keys of a field of a cell's spec -> those of the value in the grid that sets it."""


def suiting(arm: Any, grid: Grid, context: Context) -> Grid:
    """The part of a grid whose fields the spec of an arm has, at some of the grid's values.

    A field may exist only beside some values of others: a parameter of a component that the grid
    names. It is then part of all combinations, and those in which it does not exist are refused.

    Args:
        arm: The spec of the arm.
        grid: The grid.
        context: The context of the validation.
    """
    suits: Grid = {}
    seen = -1
    while len(suits) > seen:
        seen = len(suits)
        for path in [path for path in grid if path not in suits]:
            alone = {path: grid[path]}
            around = {at: values for at, values in suits.items() if _is_around(at, path)}
            tried = chain(points(alone), points(around | alone) if around else ())
            if not all(_lacks(arm, path, point, context) for point in tried):
                suits |= alone
    return {path: values for path, values in grid.items() if path in suits}


def _is_around(field: str, path: str) -> bool:
    """Whether a field lies in a mapping around that of a path, whose fields it may decide."""
    return path.startswith(field[: field.rfind(".") + 1])


def _lacks(arm: Any, path: str, point: Point, context: Context) -> bool:
    """Whether the spec of an arm lacks the field of a path, or an item of a list, at a point."""
    try:
        changed(arm, nested(point), context)
    except NoSuchItem:
        return True
    except ValidationError as fault:
        return bool(_lacking(fault, arm, path))
    return False


def _lacking(fault: ValidationError, spec: Any, path: str) -> list[Keys]:
    """The unknown field of a spec that a path names, if any; one inside its value is not."""
    keys = tuple(path.split("."))
    unknown = unknown_fields(fault, type(spec))
    return [field for field in unknown if tuple(map(str, field)) == keys[: len(field)]]


def cells_of(
    arm: str, own: Any, base: Any, grid: Grid, context: Context
) -> Iterator[tuple[Any, Place]]:
    """Make the specs of an arm at all points of a grid.

    Args:
        arm: The name of the arm.
        own: The spec of the arm.
        base: The spec of the base.
        grid: The grid, which suits the arm.
        context: The context of the validation.

    Yields:
        The spec at each point, and the places of its fields.

    Raises:
        pydantic_core.PydanticCustomError: The spec at a point is invalid; each error stands at the
            value that sets its field or, if none does, at the first value without which the other
            values are valid.
    """

    def suits(spec: Any, point: Point) -> bool:
        try:
            changed(spec, nested(point), context)
        except (ValidationError, NoSuchItem):
            return False
        return True

    def culprit(point: Point) -> str:
        rest = ((path, {p: v for p, v in point.items() if p != path}) for path in point)
        return next((path for path, others in rest if suits(own, others)), next(iter(point)))

    def called(point: Point, wrong: str) -> str:
        """The arm, if only its spec is invalid, and the other values, if only beside them."""
        words = [f"arm '{arm}'"] if suits(base, point) else []
        alike = (each for each in points(grid) if each[wrong] is point[wrong])
        if any(suits(own, each) for each in alike):
            words.append(beside({path: value for path, value in point.items() if path != wrong}))
        return "".join(f"{word}: " for word in words)

    for point, places in zip(points(grid), places_of(grid), strict=True):
        try:
            made = changed(own, nested(point), context)
        except ValidationError as fault:
            wrong = culprit(point)
            place = _at_values(places, wrong)
            raise errors_of(fault, type(own), place, called(point, wrong)) from fault
        yield made, _at_values(places, next(iter(point), ""))


def _at_values(places: Places, otherwise: str) -> Place:
    def place(field: Keys) -> Keys:
        return place_in(field, places) or places[tuple(otherwise.split("."))]

    return place


def beside(point: Point) -> str:
    """What a mistake's cause says of values that it was found with."""
    return f"with {', '.join(f'{path}={as_json(value)}' for path, value in point.items())}"


def as_json(value: Any) -> str:
    """A value in a message that tells it from another one, so that lists are written out."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse_unknown(spec: Any, path: str, values: list[Any], context: Context) -> None:
    """Refuse a field of a grid that a spec lacks.

    Args:
        spec: The spec.
        path: The dotted path of the field.
        values: Its values.
        context: The context of the validation.

    Raises:
        pydantic_core.PydanticCustomError: The spec lacks the field.
    """
    try:
        changed(spec, nested({path: values[0]}), context)
    except NoSuchItem as lack:
        raise mistake_at((path,), lack.cause, lack.cure) from lack
    except ValidationError as fault:
        lacking = _lacking(fault, spec, path)
        at_value = _at_values(places_of({path: values})[0], path)

        def place(field: Keys) -> Keys:
            return (path,) if field in lacking else at_value(field)

        raise errors_of(fault, type(spec), place) from fault


def resolve_paths(grid: Grid, suits: Grid, made: Any, place: Place) -> None:
    """Resolve the paths among the values of a grid that a cell has.

    Args:
        grid: The grid, whose values are replaced.
        suits: The part of it that suits the arm of the cell.
        made: The spec of the cell.
        place: The places of its fields.
    """
    read = plain(made)
    for path in suits:
        keys = tuple(path.split("."))
        index = int(place(keys)[1])
        value: Any = with_paths(nested({path: grid[path][index]}), read)
        for key in keys:
            value = value[key]
        grid[path][index] = value
