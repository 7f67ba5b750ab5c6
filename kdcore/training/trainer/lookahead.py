"""Batches that are read ahead of the training, so that a teacher can fetch their logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from transformers import TrainerState, TrainingArguments

from kdcore.data.batching.faults import raise_fault
from kdcore.data.responses.on_policy import OnPolicy


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


class Fetching(Protocol):
    """What fetches the logits or hidden states of rows: a teacher, or stored hidden states."""

    @property
    def prefetch(self) -> int:
        """The number of steps whose rows it is told ahead of the training."""

    def request(self, padded: Mapping[str, Any], progress: float) -> None:
        """Start to fetch what a batch needs that training reads later."""


class RowsAhead:
    """Tells a teacher the rows of coming steps.

    Args:
        teacher: The teacher, or the stored hidden states of a target.
        on_policy: The policy whose steps train on other responses than the data's, or None.
    """

    def __init__(self, teacher: Fetching, on_policy: OnPolicy | None = None) -> None:
        self._teacher, self._on_policy = teacher, on_policy
        self._epoch: Lookahead | None = None

    def over(
        self, batches: Iterator[Any], state: TrainerState, args: TrainingArguments
    ) -> Iterator[Any]:
        """Read the batches of an epoch, and request the rows of coming steps.

        Args:
            batches: The batches of an epoch; it begins at a step of its own.
            state: The state of the training.
            args: The Trainer's arguments.

        Returns:
            The same batches; the same iterator for the same epoch.
        """
        if not self._teacher.prefetch:
            return batches
        if self._epoch is None or self._epoch.batches is not batches:
            first, size = state.global_step, args.gradient_accumulation_steps

            def read(batch: Any, number: int) -> None:
                raise_fault(batch)
                step = first + number // size
                sampled = self._on_policy and self._on_policy.samples_at(step, args.seed)
                if step < state.max_steps and not sampled:
                    self._teacher.request(batch, step / max(1, state.max_steps))

            self._epoch = Lookahead(batches, self._teacher.prefetch * size, read)
        return self._epoch

    def step(self, batches: Sequence[Any], progress: float) -> None:
        """Request the rows of the step that comes next, those that were not requested before.

        Args:
            batches: The micro-batches of the step.
            progress: Share of the training done, in [0, 1].
        """
        for batch in batches:
            self._teacher.request(batch, progress)
