"""Disjoint parts of rows: with equal proportions of each label, or by what a conversation asks."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Sequence


def stratified(labels: Sequence[Hashable], low: float, high: float, seed: int = 0) -> list[int]:
    """Select the rows in the interval [low, high) of each label's own shuffle.

    The blake2b hash of ``SEED PLACE`` orders the rows of a label, so that library versions have no
    effect; the i-th of n rows is at (i + 1/2) / n. Hence disjoint intervals share no row, and
    [0, 1) selects every row.

    Args:
        labels: Label of each row.
        low: Lower bound of the interval.
        high: Upper bound of the interval, exclusive.
        seed: Seed of the shuffle.

    Returns:
        The indices of the selected rows, sorted.
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


def by_content(contents: Sequence[str], low: float, high: float) -> list[int]:
    """Select the rows in the interval [low, high) of a shuffle that their contents alone determine.

    The blake2b hash of a content is its place in the shuffle; the i-th of n different contents is
    at (i + 1/2) / n. Hence rows of one content are in one part, the order of the rows has no
    effect, and a new row moves a border by at most one row.

    Args:
        contents: Content of each row.
        low: Lower bound of the interval.
        high: Upper bound of the interval, exclusive.

    Returns:
        The indices of the selected rows, sorted.
    """
    different = sorted(set(contents), key=lambda content: _hash(content))
    chosen = {
        content for i, content in enumerate(different) if low <= (i + 0.5) / len(different) < high
    }
    return [place for place, content in enumerate(contents) if content in chosen]


def beside(others: Sequence[str], contents: Sequence[str], low: float, high: float) -> list[int]:
    """Select the contents that lie in an interval of the shuffle of other ones; see `by_content`.

    One that is among these is in the same part. Disjoint intervals share none, and [0, 1) selects
    all.

    Args:
        others: Contents, which do not move a border.
        contents: Content of each row, of which there is at least one.
        low: Lower bound of the interval.
        high: Upper bound of the interval, exclusive.

    Returns:
        The indices of the selected ones of ``others``, sorted.
    """
    shuffled = sorted(map(_hash, set(contents)))
    places = (bisect_left(shuffled, _hash(content)) for content in others)
    last = len(shuffled) - 1  # what comes after all of them is where the last one is
    return [
        number
        for number, place in enumerate(places)
        if low <= (min(place, last) + 0.5) / len(shuffled) < high
    ]


def _shuffled(seed: int, place: int) -> bytes:
    return _hash(f"{seed} {place}")


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
