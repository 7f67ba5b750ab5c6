"""Batches that are read ahead of the training, so that a served teacher scores their rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerState, TrainingArguments

from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.responses.served_teacher import ServedTeacher


class Lookahead(Iterator[Any]):
    """An iterator of batches that reads some of them ahead of its consumer.

    Args:
        batches: The batches of an epoch.
        ahead: Number of batches that are read ahead.
        read: Called with each batch and its number, from 0, as soon as it is read.

    Attributes:
        batches: The batches of an epoch.
    """

    def __init__(
        self, batches: Iterator[Any], ahead: int, read: Callable[[Any, int], None]
    ) -> None:
        self.batches, self._ahead, self._read = batches, ahead, read
        self._queue: deque[Any] = deque()
        self._count = 0

    def __next__(self) -> Any:
        while len(self._queue) <= self._ahead:
            try:
                batch = next(self.batches)
            except StopIteration:
                break
            self._read(batch, self._count)
            self._count += 1
            self._queue.append(batch)
        if not self._queue:
            raise StopIteration
        return self._queue.popleft()


class RowsAhead:
    """Tells a served teacher the rows of coming steps.

    Args:
        served: The teacher.
        on_policy: The policy whose steps train on other responses than the data's, or None.
    """

    def __init__(self, served: ServedTeacher, on_policy: OnPolicy | None) -> None:
        self.served, self._on_policy = served, on_policy
        self._epoch: Lookahead | None = None

    def over(
        self, batches: Iterator[Any], state: TrainerState, args: TrainingArguments
    ) -> Lookahead:
        """Read the batches of an epoch, and request the rows of coming steps.

        Args:
            batches: The batches of an epoch; it begins at a step of its own.
            state: The state of the training.
            args: The Trainer's arguments.

        Returns:
            The same batches; the same iterator for the same epoch.
        """
        if self._epoch is None or self._epoch.batches is not batches:
            first, size = state.global_step, args.gradient_accumulation_steps

            def read(batch: Any, number: int) -> None:
                step = first + number // size
                sampled = self._on_policy and self._on_policy.samples_at(step, args.seed)
                if step < state.max_steps and not sampled:
                    self.served.request(batch)

            self._epoch = Lookahead(batches, self.served.spec.prefetch * size, read)
        return self._epoch
