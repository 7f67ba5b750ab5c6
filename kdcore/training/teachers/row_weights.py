"""How much each of several teachers teaches a row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kdcore.errors import UserError, nearest
from kdcore.method.schedule import Points, value_at
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import values_of


@dataclass(frozen=True)
class RowWeights:
    """The weights of teachers: those that a row names, else those of the spec.

    Attributes:
        names: The names of the M teachers.
        average: Name -> weight of the rows that name no teacher; empty for equal weights.
    """

    names: tuple[str, ...]
    average: Mapping[str, float | Points]

    @classmethod
    def of(cls, spec: DistillSpec) -> RowWeights:
        """The weights of a spec's several teachers."""
        return cls(tuple(spec.teachers), spec.teacher_weights)

    def at(self, said: str, progress: float) -> tuple[float, ...]:
        """The weights of a row.

        Args:
            said: The row's ``teacher``, see `kdcore.method.records.Row`.
            progress: Share of the training done, in [0, 1].

        Returns:
            [M] weights that sum to 1.
        """
        if said:
            weights = _named(said)
        elif self.average:
            weights = {name: value_at(each, progress) for name, each in self.average.items()}
        else:
            weights = dict.fromkeys(self.names, 1.0)
        whole = math.fsum(weights.values())
        return tuple(weights.get(name, 0.0) / whole for name in self.names)

    def teaches(self, said: str) -> frozenset[str]:
        """The names of the teachers of a row at any time of the training."""
        if said:
            return frozenset(name for name, weight in _named(said).items() if weight)
        if not self.average:
            return frozenset(self.names)
        return frozenset(name for name, each in self.average.items() if any(values_of(each)))

    def counts(self, said: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Name -> number of rows that the teacher teaches alone, and together with others."""
        found = {name: [0, 0] for name in self.names}
        for each in said:
            taught = self.teaches(each)
            for name in taught:
                found[name][len(taught) > 1] += 1
        return {name: (alone, shared) for name, (alone, shared) in found.items()}

    def refuse(self, rows: Iterable[tuple[str, str]]) -> None:
        """Check what rows say of their teachers.

        Args:
            rows: The id of each row, and its ``teacher``.

        Raises:
            UserError: A row names an unknown teacher, or weights that cannot be used.
        """
        seen = set[str]()
        for id, said in rows:
            if not said or said in seen:
                continue
            seen.add(said)
            weights = _named(said)
            unknown = next((name for name in weights if name not in self.names), None)
            if unknown is not None:
                raise UserError(
                    f"{id} names the unknown teacher '{unknown}'",
                    f"{nearest(unknown, self.names)}; or read another field of the rows (teacher: "
                    "FIELD in data.train)",
                )
            right = all(math.isfinite(each) and each >= 0 for each in weights.values())
            if not (right and any(weights.values())):
                raise UserError(
                    f"{id} has the teacher weights {said}",
                    "write numbers of at least 0, one of them above 0",
                )


def _named(said: str) -> dict[str, float]:
    """The weights that a row names; NaN for what is not a number."""
    if not said.lstrip().startswith("{"):
        return {said: 1.0}
    try:
        read = json.loads(said)
    except ValueError:
        return {said: 1.0}  # the name of no teacher
    return {
        name: float(each)
        if isinstance(each, int | float) and not isinstance(each, bool)
        else math.nan
        for name, each in read.items()
    }
