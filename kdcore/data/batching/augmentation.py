"""Augmentation: another random view of each training row in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from kdcore.data.rows import RowDataset
from kdcore.data.source import Augmentation, DataSource
from kdcore.errors import UserError
from kdcore.method.generators import generator_at
from kdcore.method.records import Row
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import CachedTeacherSpec


class AugmentedRows(Dataset[tuple[int, Row]]):
    """Rows of which each epoch sees another view.

    An item's number tells the epoch and the row (``epoch * R + row``), and the generator of a view
    is seeded by both. So it does not matter which worker or process makes a view, and a resumed
    training sees the same ones.

    Args:
        rows: The R rows.
        augmentation: Draws a view of a row.
        seed: Seed of the run.
    """

    def __init__(self, rows: RowDataset, augmentation: Augmentation, seed: int) -> None:
        self._rows, self._augmentation, self._seed = rows, augmentation, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[int, Row]:
        epoch, place = divmod(number, len(self))
        index, row = self._rows[place]
        generator = generator_at("cpu", self._seed, epoch, place, "augmentation")
        return index, self._augmentation(row, generator)


class NumberedByEpoch(Sampler[int]):
    """The order of `AugmentedRows`, which tells each item the epoch.

    Args:
        count: Number of rows.
        seed: Seed of the shuffles.
        order: The order of the rows (default: shuffled, by the seed and the epoch alone).
    """

    def __init__(self, count: int, seed: int, order: Sampler[int] | None = None) -> None:
        self._count, self._seed, self._epoch = count, seed, 0
        self._order: Any = order

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if self._order is None:
            generator = generator_at("cpu", self._seed, self._epoch, "augmented order")
            places = torch.randperm(self._count, generator=generator).tolist()
        else:
            places = self._order
        yield from (self._epoch * self._count + place for place in places)


def augmentation_of(source: DataSource) -> Augmentation | None:
    """The augmentation of a source's training rows, if it has one."""
    found: Augmentation | None = getattr(source, "augmentation", None)
    return found


def refuse_augmentation(spec: DistillSpec, source: DataSource, *, cached: bool = False) -> None:
    """Check that no part of a run uses rows as they are where training sees other views of them.

    Args:
        spec: The spec.
        source: The source of its training rows.
        cached: Whether a teacher cache of the rows is about to be built.

    Raises:
        UserError: It does.
    """
    if augmentation_of(source) is None:
        return
    caches = [each for each in spec.teachers.values() if isinstance(each, CachedTeacherSpec)]
    readers = {
        "a teacher cache": (cached or spec.data.teacher_cache or caches, "let the teacher run"),
        "training.packing": (spec.training.packing, "remove training.packing"),
        "data.on_policy": (spec.data.on_policy, "remove data.on_policy"),
        "method.alignment": (spec.method.alignment, "remove method.alignment"),
    }
    for name, (used, cure) in readers.items():
        if used:
            raise UserError(
                f"data.train augments its rows anew in each epoch, and {name} uses the rows as "
                "they are",
                f"{cure}, or remove augment from data.train",
                "data.train",
            )
