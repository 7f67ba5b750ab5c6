"""Batches of a stream without an end: their order, and what cannot be done with such a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from kdcore.data.batching.faults import fault
from kdcore.data.encoded.stream_windows import stream_of
from kdcore.data.encoded.streamed_rows import StreamedRows
from kdcore.data.source import Augmentation, DataSource
from kdcore.errors import UserError
from kdcore.method.generators import generator_at
from kdcore.method.records import Row
from kdcore.specs.train_drafter import TrainDrafterSpec, TrainedSpec

Item = tuple[int, Row | UserError]
"""A row, or the reason why it cannot be read, with its index."""


class StreamItems(Dataset[Item]):
    """The rows of a stream; a mistake in the data is an item, which a worker can send.

    The generator of a view of a row is seeded by its place, so that a resumed training sees the
    same views, and another one of each row when the stream begins again.

    Args:
        rows: The rows.
        augmentation: Draws a view of a row, or None.
        seed: Seed of the run.
    """

    def __init__(
        self, rows: StreamedRows, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self._rows, self._augmentation, self._seed = rows, augmentation, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Item:
        try:
            row = self._rows[place]
        except UserError as fault:
            return place, fault
        if self._augmentation is None:
            return place, row
        generator = generator_at("cpu", self._seed, place, "augmentation")
        return place, self._augmentation(row, generator)


@dataclass(frozen=True, slots=True)
class StreamCollation:
    """Collates the items of a stream.

    Attributes:
        collate: Makes a batch of rows.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Make a batch of the rows with a learned token, or of the first one if none has any.

        Args:
            items: B items.

        Returns:
            The batch of at most B rows; the mistake in place of a batch that cannot be read.
        """
        rows = []
        for place, row in items:
            if isinstance(row, UserError):
                return fault(row)
            rows.append((place, row))
        return self.collate([each for each in rows if each[1].mask.any()] or rows[:1])


class WindowOrder(Sampler[int]):
    """The order of a stream's rows, shuffled within each window by the seed and the window alone.

    Args:
        rows: The rows.
        seed: Seed of the shuffles; None keeps the order of the stream.
    """

    def __init__(self, rows: StreamedRows, seed: int | None) -> None:
        self._count, self._window, self._seed = len(rows), rows.window, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._count, self._window):
            size = min(self._window, self._count - start)
            order = torch.arange(size)
            if self._seed is not None:
                generator = generator_at("cpu", self._seed, start // self._window, "stream")
                order = torch.randperm(size, generator=generator)
            yield from (start + order).tolist()


def refuse_stream(
    spec: TrainedSpec, source: DataSource, *, cached: bool = False, chosen: bool = False
) -> None:
    """Check that a training which reads a stream without an end needs no row before its time.

    Args:
        spec: The spec.
        source: The source of its training rows.
        cached: Whether a teacher cache of the rows is about to be built.
        chosen: Whether the rows choose the vocabulary of a drafter.

    Raises:
        UserError: It does.
    """
    if stream_of(source) is None:
        return
    training = spec.training
    if training.steps is None:
        raise UserError(
            "data.train is a stream without an end, and the number of steps is not known",
            "set training.steps, or limit in data.train",
            "training.steps",
        )
    if cached:
        raise UserError(
            "data.train is a stream without an end, and a cache has all of its rows",
            "set limit in data.train",
            "data.train",
        )
    readers: dict[str, Any] = {
        "drafter.vocabulary": chosen,
        "training.packing": training.packing,
        "training.group_by_length": training.group_by_length,
        "training.probe_every": training.probe_every,
        "data.responses.by": spec.data.responses.by != "dataset",
    }
    if isinstance(spec, TrainDrafterSpec):
        readers["data.hidden_states"] = spec.data.hidden_states
    else:
        readers |= {
            "data.teacher_cache": spec.data.teacher_cache,
            "data.on_policy": spec.data.on_policy,
            "data.teacher_prompt": spec.data.teacher_prompt,
            "method.alignment": spec.method.alignment,
            "teachers": spec.teachers,
        }
    for field in (field for field, used in readers.items() if used):
        raise UserError(
            f"data.train is a stream without an end, and {field} needs all rows before the "
            "training",
            f"remove {field}, or set limit in data.train",
            field,
        )
