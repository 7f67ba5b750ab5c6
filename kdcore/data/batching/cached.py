"""Batches with what a teacher cache has of their rows, read by whoever makes the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcore.data.batching.faults import fault
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.errors import UserError

CACHED = "cached"
"""Name in a batch of the arrays of the teacher cache."""


@dataclass(frozen=True, slots=True)
class CachedCollation:
    """Collates rows, and reads the teacher cache.

    Attributes:
        collate: Makes a batch of items.
        cache: The cache.
        keys: The key in the cache of each training row.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]
    cache: TeacherCache
    keys: Sequence[bytes]

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Make a batch.

        Args:
            items: The items.

        Returns:
            The batch with `CACHED`; the mistake in place of a batch whose shard is damaged.
        """
        batch = self.collate(items)
        try:
            read = self.cache.arrays([self.keys[place] for place in batch["index"].tolist()])
        except UserError as mistake:
            return fault(mistake)
        return batch | {CACHED: read}
