"""Parts of labelled rows that share no row and have each label in like proportion."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence


def stratified(labels: Sequence[Hashable], low: float, high: float, seed: int = 0) -> list[int]:
    """The places, rising, of the rows that fall into [low, high) of each label's own shuffle.

    A label's rows are put in the order of the blake2b hash of ``SEED PLACE``, which no version of
    a library changes; the i-th of n stands at (i + 1/2) / n. So parts that do not overlap as
    intervals share no row, and [0, 1) is every row.
    """
    of_label: dict[Hashable, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        of_label[label].append(place)
    return sorted(
        place
        for places in of_label.values()
        for i, place in enumerate(sorted(places, key=lambda place: _shuffled(seed, place)))
        if low <= (i + 0.5) / len(places) < high
    )


def _shuffled(seed: int, place: int) -> bytes:
    return hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
