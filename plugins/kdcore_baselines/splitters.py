"""The neutral splitter, and the one that a drafter's levels are told apart by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kdcore import Params, by_keywords
from kdcore_baselines import params

if TYPE_CHECKING:
    from kdcore import BuildContext, LogitBatch, Part


class Whole:
    """Leaves the knowledge whole."""

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return dict(parts)


class ByPosition:
    """Each part once for each position of a row: ``kd`` becomes ``kd_1`` to ``kd_D``.

    The parts of a position weigh 0 elsewhere, so that they add up to the part they came from.
    """

    @by_keywords(params.ByPosition)
    def __init__(self, params: params.ByPosition, context: BuildContext) -> None:
        self.positions = params.positions

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{name}_{i}" for name in names for i in range(1, self.positions + 1))

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        place = batch.position.clamp(max=self.positions - 1)
        return {
            f"{name}_{i + 1}": replace(part, weight=part.weight * (place == i))
            for name, part in parts.items()
            for i in range(self.positions)
        }
