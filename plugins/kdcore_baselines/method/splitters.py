"""Neutral splitter, and a splitter by position for the levels of a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kdcore import Params, by_keywords
from kdcore_baselines.method import params

if TYPE_CHECKING:
    from kdcore import BuildContext, LogitBatch, Part


class Whole:
    """Splitter that returns the parts unchanged."""

    any_tokenizer = True
    keeps_classes = True

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return dict(parts)


class ByPosition:
    """Splitter by position: ``kd`` becomes ``kd_1`` to ``kd_D``.

    Each new part has weight 0 at the other positions, so the parts add up to the original part.
    """

    any_tokenizer = True
    keeps_classes = True

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
