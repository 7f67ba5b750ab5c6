"""What a Trainer draws batches from, as the training section of a spec says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset, Sampler, SequentialSampler

from kdcore.data.batching.augmentation import AugmentedRows, NumberedByEpoch
from kdcore.data.batching.grouping import LengthGroups
from kdcore.data.batching.packing import PackedRows, Packing
from kdcore.data.batching.stored import Collate, Reader, ReadingCollation
from kdcore.data.batching.streaming import StreamCollation, StreamItems, WindowOrder
from kdcore.data.encoded.streamed_rows import StreamedRows
from kdcore.data.rows import RowDataset, collate, lengths_of
from kdcore.data.source import Augmentation
from kdcore.specs.parts.training import TrainingSpec


@dataclass(frozen=True, slots=True)
class Batches:
    """The training rows as a Trainer reads them.

    Attributes:
        items: The data set: a row or, of packed rows, a sequence of them is an item.
        collate: Makes a batch of items.
        order: The order of the items, whose epoch is set; None for the Trainer's shuffle.
    """

    items: Dataset[Any]
    collate: Collate
    order: Sampler[int] | None = None

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def collate_for(self, reader: Reader | None) -> Collate:
        """The collation, which reads what a teacher has stored, if there is a reader of that."""
        return self.collate if reader is None else ReadingCollation(self.collate, reader)

    @classmethod
    def of(
        cls,
        training: TrainingSpec,
        rows: RowDataset,
        pad: Mapping[str, int],
        *,
        seed: int,
        capacity: int,
        processes: int,
        flat: bool = False,
        augmentation: Augmentation | None = None,
    ) -> Batches:
        """Pack, group or augment rows, if the spec says so.

        Args:
            training: The training section of the spec.
            rows: The training rows.
            pad: Padding value of each input, see `kdcore.data.rows.collate`.
            seed: Seed of the run.
            capacity: Maximum number of positions of a row, and so of a sequence of packed rows.
            processes: Number of processes that share a step.
            flat: See `kdcore.data.batching.packing.Packing`.
            augmentation: Draws another view of each row in each epoch, or None.

        Returns:
            The items, their collation and their order.
        """
        items: Dataset[Any]
        sequential = training.trainer.get("train_sampling_strategy") == "sequential"
        if isinstance(rows.rows, StreamedRows):
            windows = WindowOrder(rows.rows, None if sequential else seed)
            items = StreamItems(rows.rows, augmentation, seed)
            return cls(items, StreamCollation(partial(collate, pad=pad)), windows)
        if training.packing:
            packed = PackedRows(rows.rows, capacity, None if sequential else seed)
            return cls(packed, Packing(pad, flat))
        items = rows
        order: Sampler[int] | None = None
        if training.group_by_length:
            group = training.batch_size * processes
            order = LengthGroups(lengths_of(rows.rows), group, seed)
        if augmentation is not None:
            items = AugmentedRows(rows, augmentation, seed)
            own = SequentialSampler(range(len(rows))) if sequential else order
            order = NumberedByEpoch(len(rows), seed, own)
        return cls(items, partial(collate, pad=pad), order)  # workers that are spawned pickle it
