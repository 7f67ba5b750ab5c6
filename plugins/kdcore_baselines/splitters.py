"""The neutral splitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcore.protocols import BuildContext
    from kdcore.records import LogitBatch, Part


class Whole:
    """Leaves the knowledge whole."""

    def __init__(self, params: BaseModel, context: BuildContext) -> None:
        pass

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return dict(parts)
