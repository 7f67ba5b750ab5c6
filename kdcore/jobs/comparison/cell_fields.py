"""Where a comparison sets the fields of its cells, which mistakes in a cell name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.comparison.cells import Cell
from kdcore.specs.compare import CompareSpec
from kdcore.specs.grid import beside
from kdcore.specs.parts.changes import Keys, place_in
from kdcore.specs.reading.file import placed

VALIDATION: Mapping[Keys, Keys] = {("data", "heldout"): ("validation",)}
"""Where a trial's held-out rows are set."""


def placed_failure(spec: CompareSpec, cell: Cell, wrong: UserError) -> UserError:
    """Why a cell failed, with the fields of the comparison and, where known, their lines.

    Args:
        spec: The compare spec.
        cell: The cell.
        wrong: The mistake in its spec, or more than one.

    Returns:
        The mistakes, whose causes begin with their fields.
    """
    arm = cell.arm.partition("+")[0]
    told = in_comparison(wrong, spec, arm, cell.point, VALIDATION if cell.trial else {})
    if (with_lines := placed(told)).placed:
        return with_lines
    return _of_each(told, lambda m: f"{m.field}: {m.cause}" if m.field else m.cause)


def in_comparison(
    wrong: UserError,
    spec: CompareSpec,
    arm: str,
    point: int,
    fields: Mapping[Keys, Keys] | None = None,
    called: str = "",
) -> UserError:
    """The mistakes of a cell's spec, with the fields of the comparison's.

    Args:
        wrong: The mistake, or more than one.
        spec: The compare spec.
        arm: The name of the cell's arm; "" for none.
        point: The index of its grid point.
        fields: Keys of other fields of the cell -> keys of the comparison's field that sets them.
        called: What the causes begin with, e.g. ``arm 'a'``.
    """
    changes = {f"arms.{arm}": spec.arms[arm]} if arm else {}
    values = spec.points_of(arm)[point] if arm else {}
    in_grid = spec.places_of(arm, point) if arm else {}

    def field(m: UserError) -> str:
        keys = tuple(m.field.split("."))
        if found := place_in(keys, {**(fields or {}), **in_grid}):
            return ".".join(map(str, found))
        where = next((each for each, made in changes.items() if _is_set(made, m.field)), "base")
        return f"{where}.{m.field}"

    def cause(m: UserError) -> str:
        within = {path: each for path, each in values.items() if path.startswith(f"{m.field}.")}
        words = [called, beside(within) if within else "", m.cause.removeprefix(f"{m.field}: ")]
        return ": ".join(filter(None, words))

    return _of_each(wrong, cause, lambda m: m.field and field(m))


def _of_each(
    wrong: UserError,
    cause: Callable[[UserError], str],
    field: Callable[[UserError], str] = lambda m: m.field,
) -> UserError:
    """A mistake, or each of several, in other words."""
    found = wrong.found if isinstance(wrong, Mistakes) else [wrong]
    told = [UserError(cause(m), m.cure, field(m)) for m in found]
    further = wrong.further if isinstance(wrong, Mistakes) else 0
    return told[0] if len(told) == 1 and not further else Mistakes(told, further)


def _is_set(changes: Any, field: str) -> bool:
    """Whether changes set a field, what is inside it, or what it is part of."""
    for key in field.split("."):
        if isinstance(changes, list):
            changes = dict(zip(map(str, range(len(changes))), changes, strict=True))
        if not isinstance(changes, dict) or "name" in changes:
            return True  # a component is replaced whole
        if key not in changes:
            return False
        changes = changes[key]
    return True
