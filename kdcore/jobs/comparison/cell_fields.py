"""Where a comparison sets the fields of its cells, which mistakes in a cell name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.comparison.cells import Cell
from kdcore.specs.compare import CompareSpec
from kdcore.specs.reading.file import placed


def reason_of(spec: CompareSpec, cell: Cell, wrong: UserError) -> str:
    """Why a cell failed, with the fields of the comparison and, where known, their lines.

    Args:
        spec: The compare spec.
        cell: The cell.
        wrong: The mistake in its spec, or more than one.

    Returns:
        One line.
    """
    arm = cell.arm.partition("+")[0]
    fields = {"data.heldout": "validation"} if cell.trial else {}
    told = placed(in_comparison(wrong, spec, arm, cell.point, fields))
    found = told.found if isinstance(told, Mistakes) else [told]
    without = [told.placed or not each.field for each in found]
    return "; ".join(
        m.cause if bare else f"{m.field}: {m.cause}" for m, bare in zip(found, without, strict=True)
    )


def in_comparison(
    wrong: UserError,
    spec: CompareSpec,
    arm: str,
    point: int,
    fields: Mapping[str, str] | None = None,
    called: str = "",
) -> UserError:
    """The mistakes of a cell's spec, with the fields of the comparison's.

    Args:
        wrong: The mistake, or more than one.
        spec: The compare spec.
        arm: The name of the cell's arm; "" for none.
        point: The index of its grid point.
        fields: Other fields of the cell -> field of the comparison with its value.
        called: What the causes begin with, e.g. ``arm 'a'``.
    """
    changes: dict[str, Any] = {}
    places = dict(fields or {})
    if arm:
        changes = {f"arms.{arm}": spec.arms[arm]}
        values = spec.points_of(arm)[point]
        places |= {
            path: f"grid.{path}.{spec.grid[path].index(value)}" for path, value in values.items()
        }

    def field(of_cell: str) -> str:
        for path, place in places.items():
            if _is_part(of_cell, path) or _is_part(path, of_cell):
                return place + of_cell[len(path) :]
        where = next((each for each, made in changes.items() if _is_set(made, of_cell)), "base")
        return f"{where}.{of_cell}"

    told = [
        UserError(
            (called and f"{called}: ") + m.cause.removeprefix(f"{m.field}: "),
            m.cure,
            m.field and field(m.field),
        )
        for m in (wrong.found if isinstance(wrong, Mistakes) else [wrong])
    ]
    return told[0] if len(told) == 1 else Mistakes(told)


def _is_part(field: str, whole: str) -> bool:
    return f"{field}.".startswith(f"{whole}.")


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
