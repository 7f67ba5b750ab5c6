"""Auxiliary rows: each micro-batch also learns from rows of a second source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from kdcore.data.rows import RowDataset, collate
from kdcore.method.generators import generator_at
from kdcore.method.loss_engine import LossEngine
from kdcore.specs.distill import DistillSpec
from kdcore.training.method import Method
from kdcore.training.teachers.kinds import NoTeacher, OfAnyRows
from kdcore.training.views import StudentView, View

AUXILIARY = "auxiliary"
"""The field of ``data`` that names the source, and the prefix of the rows' figures."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of a micro-batch, and how a model learns from them.

    Attributes:
        padded: The padded batch.
        whole: Number of rows or tokens of the step that the loss is averaged over.
        engine: The loss engine.
        view: Runs the model and its teacher.
        row_ids: Returns the id of a row by its index, for messages.
        purpose: The prefix of the figures and of what seeds the gates; empty for training rows.
    """

    padded: dict[str, Any]
    whole: float
    engine: LossEngine
    view: View
    row_ids: Callable[[int], str]
    purpose: tuple[str, ...] = ()


@dataclass(frozen=True)
class Auxiliary:
    """The rows of a second source, and how a model learns from them.

    The loss of a step is the sum of two means: that over the training rows, and that over these.
    No state is kept: the place in the run tells the rows, so that a resumed run reads the same.

    Attributes:
        rows: The rows.
        collate: Makes a padded batch of rows with their indices.
        engine: The loss engine of their terms.
        view: Runs the model and, where a term needs it, the teacher.
        batch_size: Number of rows of a micro-batch.
        seed: Seed of the run.
    """

    rows: RowDataset
    collate: Callable[[list[Any]], dict[str, Any]]
    engine: LossEngine
    view: View
    batch_size: int
    seed: int
    _orders: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spec: DistillSpec,
        method: Method,
        rows: RowDataset,
        pad: Mapping[str, int],
        view: StudentView,
        chunk: int,
    ) -> Auxiliary:
        """The auxiliary rows of a run.

        Args:
            spec: The spec, which has ``data.auxiliary``.
            method: Its method.
            rows: The rows.
            pad: Padding value of each input, see `kdcore.data.rows.collate`.
            view: The view of the training rows.
            chunk: Number of positions whose loss is computed at once.

        Returns:
            The rows.
        """
        objective, asked = method.auxiliary, spec.data.auxiliary
        assert objective is not None and asked is not None
        taught_by = OfAnyRows(view.taught_by) if objective.of_teacher else NoTeacher()
        return cls(
            rows,
            partial(collate, pad=pad),
            LossEngine(objective, method.streams, chunk),
            view.beside(taught_by),
            asked.batch_size or spec.training.batch_size,
            spec.seed,
        )

    def of_step(self, step: int, process: int, args: TrainingArguments, count: int) -> list[Any]:
        """Make the padded batches of a step: the next rows of an order that each epoch draws anew.

        Args:
            step: Number of the optimizer step.
            process: Number of the process.
            args: The Trainer's arguments.
            count: Number of micro-batches of the step.

        Returns:
            One batch for each micro-batch of this process.
        """
        made = []
        for micro_step in range(count):
            before = step * args.gradient_accumulation_steps + micro_step
            first = (before * args.world_size + process) * self.batch_size
            places = [self._place(k) for k in range(first, first + self.batch_size)]
            made.append(self.collate([self.rows[place] for place in places]))
        return made

    def micro_batch(self, padded: dict[str, Any], whole: float) -> MicroBatch:
        """What the Trainer does with a batch of `of_step`."""

        def row_id(index: int) -> str:
            return self.rows.rows[index].id

        return MicroBatch(padded, whole, self.engine, self.view, row_id, (AUXILIARY,))

    def _place(self, count: int) -> int:
        """The index of the row that is read after ``count`` others."""
        epoch, place = divmod(count, len(self.rows))
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            generator = generator_at("cpu", self.seed, AUXILIARY, epoch)
            self._orders[epoch] = torch.randperm(len(self.rows), generator=generator)
        return int(self._orders[epoch][place])
