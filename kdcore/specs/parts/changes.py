"""Changes laid over a spec, as an arm of a comparison and a point of its grid say them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from typing import Any, TypeAlias, TypeVar

Spec = TypeVar("Spec")
Point: TypeAlias = dict[str, Any]
"""Dotted path of a field -> its value there."""
Keys: TypeAlias = tuple[str | int, ...]
"""The keys and indices on the way to a value of a spec."""
Places: TypeAlias = dict[Keys, Keys]
"""A field that changes set -> where the changes say its value."""


class NoSuchItem(ValueError):
    """Changes set an item that a list lacks.

    Attributes:
        keys: The keys of the item, those of the changes.
        cause: What is wrong.
        cure: What to write instead.
    """

    def __init__(self, keys: Keys, items: int) -> None:
        self.keys = keys
        self.cause = f"a list of {items} has no item '{keys[-1]}'"
        self.cure = "give the index of an item, counted from 0"
        super().__init__(f"{self.cause}: {self.cure}")


def plain(spec: Any) -> dict[str, Any]:
    """A spec as its file would say it, defaults included."""
    said: dict[str, Any] = spec.model_dump(mode="json")
    return said


def _merged(base: Any, changes: Any, at: Keys = ()) -> Any:
    """Plain data with changes laid over it; a component (what has a name) is replaced whole.

    The keys of changes to a list are indices of its items. Raises NoSuchItem for other keys.
    """
    if isinstance(base, list) and isinstance(changes, dict) and "name" not in changes:
        return _merged_items(base, changes, at)
    if not (isinstance(base, dict) and isinstance(changes, dict)) or "name" in changes:
        return changes
    merged = {key: _merged(base.get(key), each, (*at, key)) for key, each in changes.items()}
    return base | merged


def _merged_items(items: list[Any], changes: dict[Any, Any], at: Keys) -> list[Any]:
    merged = list(items)
    for key, change in changes.items():
        if str(key) not in map(str, range(len(items))):
            raise NoSuchItem((*at, key), len(items))
        merged[int(key)] = _merged(merged[int(key)], change, (*at, key))
    return merged


def changed(base: Spec, changes: dict[str, Any], context: dict[str, Any] | None = None) -> Spec:
    """A spec with changes laid over it.

    Raises pydantic.ValidationError and NoSuchItem.
    """
    model: Any = type(base)
    spec: Spec = model.model_validate(_merged(plain(base), changes), context=context)
    return spec


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


def points(grid: dict[str, list[Any]]) -> list[Point]:
    """Every combination of a grid's values; of an empty one, the one that changes nothing."""
    return [dict(zip(grid, each, strict=True)) for each in product(*grid.values())]


def places_of(grid: dict[str, list[Any]]) -> list[Places]:
    """Where a grid says the values of each of its `points`: the path and the value's index."""
    numbered = {path: [*range(len(values))] for path, values in grid.items()}
    return [
        {tuple(path.split(".")): (path, index) for path, index in each.items()}
        for each in points(numbered)
    ]


def place_in(field: Keys, places: Mapping[Keys, Keys]) -> Keys | None:
    """Where a field stands that changes set, or that is part of what they set.

    Args:
        field: The keys of the field.
        places: Where the changes say the values of their fields.

    Returns:
        The keys of its place; None if the changes set neither.
    """
    known = tuple(map(str, field))
    for whole, place in places.items():
        if known[: len(whole)] == whole:
            return (*place, *field[len(whole) :])
    return None


def with_paths(changes: Any, read: Any) -> Any:
    """Changes with the paths of the spec that they make: those in it are resolved already."""
    if isinstance(changes, dict) and isinstance(read, dict):
        return {key: with_paths(value, read.get(key)) for key, value in changes.items()}
    if isinstance(changes, dict) and isinstance(read, list):
        return {key: with_paths(value, read[int(key)]) for key, value in changes.items()}
    if isinstance(changes, list) and isinstance(read, list) and len(changes) == len(read):
        return [with_paths(*both) for both in zip(changes, read, strict=True)]
    is_path = isinstance(changes, str) and isinstance(read, str) and os.path.isabs(read)
    return read if is_path else changes


def has(changes: Any, path: str) -> bool:
    """Whether changes set a field, or what is inside it."""
    for key in path.split("."):
        if isinstance(changes, list):
            changes = dict(zip(map(str, range(len(changes))), changes, strict=True))
        if not isinstance(changes, dict) or key not in changes:
            return False
        changes = changes[key]
    return True
