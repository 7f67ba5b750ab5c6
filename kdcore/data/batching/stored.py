"""Batches with what their teacher has stored of the rows, read by whoever makes the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kdcore.data.batching.faults import fault
from kdcore.errors import UserError

STORED = "stored"
"""Name in a batch of what was read, see `kdcore.method.records.Batch`."""
Collate: TypeAlias = Callable[[Sequence[Any]], dict[str, Any]]
"""Makes a batch of items."""
Reader: TypeAlias = Callable[[Mapping[str, Any]], Any]
"""Reads what a teacher has stored of the rows of a collated batch; workers have copies of it."""


@dataclass(frozen=True, slots=True)
class ReadingCollation:
    """Collates rows, and reads what their teacher has stored.

    Attributes:
        collate: Makes a batch of items.
        reader: Reads what the teacher has stored.
    """

    collate: Collate
    reader: Reader

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Make a batch.

        Args:
            items: The items.

        Returns:
            The batch with `STORED`; the mistake in place of a batch that cannot be read.
        """
        batch = self.collate(items)
        try:
            return batch | {STORED: self.reader(batch)}
        except UserError as mistake:
            return fault(mistake)
