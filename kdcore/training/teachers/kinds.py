"""The kinds of teachers: live, cached, served, in other tokens, with another prompt, or none.

The Trainer, the views and the measurements ask a `Teacher` for the logits of a batch, and do not
know where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.alignment.paired_rows import PairedRows, aligned_logits
from kdcore.data.alignment.prompted_rows import PromptedRows
from kdcore.data.batching.stored import STORED, Reader
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.data.responses.endpoint.teacher import ServedTeacher
from kdcore.data.rows import batch_of
from kdcore.method.logits import TeacherLogits, no_teacher
from kdcore.method.records import Batch
from kdcore.training.model_view import Matched, ModelView, frozen_logits


class Teacher(Protocol):
    """What teaches a student: logits at the N learned positions of a batch."""

    @property
    def prefetch(self) -> int:
        """The number of steps whose rows it is told ahead of the training (`request`)."""
        return 0

    @property
    def has_any(self) -> bool:
        """Whether it has the logits of any rows, and not of the training rows alone."""
        return False

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Return the logits [N, V] for a batch of training rows.

        Args:
            batch: The batch.
            progress: Share of the training done, in [0, 1].

        Returns:
            The logits, a chunk of which exists at a time.
        """

    def of_any(self, batch: Batch) -> TeacherLogits | None:
        """Return the logits [N, V] for any rows; None if it lacks them (`has_any`)."""
        return None

    def request(self, padded: Mapping[str, Any], progress: float) -> None:
        """Start to fetch the logits of a batch that training reads later.

        Args:
            padded: The batch as `kdcore.data.rows.collate` makes it.
            progress: Share of the training that is done then, in [0, 1].
        """
        return None

    def reader(self) -> Reader | None:
        """Return what reads this teacher's share of a batch in the process that makes the batch.

        Returns:
            The reader, whose result a batch has as `kdcore.method.records.Batch.stored`; None if
            the teacher has nothing stored.
        """
        return None

    def figures(self) -> dict[str, float]:
        """Return figures of the steps since the last call, for the log."""
        return {}

    def follow(self, student: nn.Module) -> None:
        """Learn the student's weights after an optimizer step."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, for the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`."""
        return None


@dataclass(frozen=True)
class NoTeacher(Teacher):
    """No teacher, for a student that learns from the labels alone."""

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Return logits of no classes, [N, 0]."""
        return no_teacher(batch)


@dataclass(frozen=True)
class LiveTeacher(Teacher):
    """A model that runs beside the student: whole, spread over devices, or sharded.

    Attributes:
        view: The view of the model.
        model: The model.
    """

    view: ModelView
    model: PreTrainedModel

    @property
    def has_any(self) -> bool:
        """True."""
        return True

    @classmethod
    def of(
        cls, model: PreTrainedModel, classes: int, matched: Matched | None = None
    ) -> LiveTeacher:
        """Take a model as the teacher.

        Args:
            model: The model.
            classes: V, the number of its classes that are compared.
            matched: What of it matchers read.

        Returns:
            The teacher.
        """
        return cls(ModelView(model, classes, matched), model)

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Run the model on a batch."""
        return frozen_logits(self.view, self.model, batch)

    def of_any(self, batch: Batch) -> TeacherLogits | None:
        """Run the model on a batch."""
        return frozen_logits(self.view, self.model, batch)


@dataclass(frozen=True)
class OfAnyRows(Teacher):
    """A teacher on rows beside the training rows, which a cache of it does not have.

    Attributes:
        own: A teacher that has the logits of any rows (`Teacher.has_any`).
    """

    own: Teacher

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Return its logits for any rows."""
        found = self.own.of_any(batch)
        assert found is not None  # has_any
        return found


@dataclass(frozen=True, slots=True)
class CachedClasses:
    """Reads the stored classes of batches.

    Attributes:
        cache: The cache.
        keys: The key in the cache of each training row.
    """

    cache: TeacherCache
    keys: Sequence[bytes]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Read what `TeacherCache.taken` needs. Raises UserError if a shard is damaged."""
        return self.cache.arrays([self.keys[place] for place in batch["index"].tolist()])


@dataclass(frozen=True)
class CachedTeacher(Teacher):
    """A teacher cache, which has the training rows.

    Attributes:
        cache: The cache.
        keys: The key in the cache of each training row, as the teacher reads it.
        live: The teacher of other rows, or None.
    """

    cache: TeacherCache
    keys: Sequence[bytes]
    live: LiveTeacher | None = None

    @property
    def has_any(self) -> bool:
        """Whether there is a live teacher."""
        return self.live is not None

    def reader(self) -> Reader:
        """Return what reads the stored classes."""
        return CachedClasses(self.cache, self.keys)

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """The stored classes of a batch, which are read now if the loader has not."""
        read = batch.stored or self.reader()({"index": batch.index})
        return self.cache.taken(read, batch.mask.device)

    def of_any(self, batch: Batch) -> TeacherLogits | None:
        """Run the live teacher on a batch, if there is one."""
        return None if self.live is None else self.live.of_any(batch)


@dataclass(frozen=True)
class RequestedTeacher(Teacher):
    """A teacher behind servers.

    Attributes:
        served: The requests to the servers.
    """

    served: ServedTeacher

    @property
    def prefetch(self) -> int:
        """The number of steps ahead, as the spec says."""
        return self.served.spec.prefetch

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Wait for the classes of a batch."""
        return self.served.logits(batch)

    def request(self, padded: Mapping[str, Any], progress: float) -> None:
        """Request the classes of a batch."""
        self.served.request(padded)

    def figures(self) -> dict[str, float]:
        """Return the seconds in which the training waited."""
        return {"teacher_wait": self.served.pop_waited()}


@dataclass(frozen=True, slots=True)
class OtherRows:
    """Makes the batch of the rows that a teacher reads in place of the student's.

    Attributes:
        rows: The teacher's rows.
        reader: Reads what the teacher has stored of them, or None.
    """

    rows: PairedRows | PromptedRows
    reader: Reader | None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Collate the teacher's rows of a batch."""
        theirs = self.rows.collated(batch["index"])
        return theirs if self.reader is None else theirs | {STORED: self.reader(theirs)}

    def of(self, batch: Batch) -> Batch:
        """The teacher's batch, made by the loader or now."""
        read = batch.stored or self({"index": batch.index})
        return batch_of(read, batch.mask.device)


@dataclass(frozen=True)
class AlignedTeacher(Teacher):
    """A teacher that reads its own tokens of the student's rows; it has no others.

    Attributes:
        own: The teacher of the rows in its own tokens.
        paired: The training rows as it reads them.
    """

    own: Teacher
    paired: PairedRows

    def reader(self) -> OtherRows:
        """Return what makes the batches of its own tokens."""
        return OtherRows(self.paired, self.own.reader())

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Return its logits at the student's positions."""
        if batch.sampled:
            rows, theirs = self.paired.sampled(batch)
        else:
            rows, theirs = self.paired.aligned(batch), self.reader().of(batch)
        return aligned_logits(rows, theirs, self.own.logits(theirs, progress))


@dataclass(frozen=True)
class PromptedTeacher(Teacher):
    """A teacher that reads another prompt before the same responses; it has no other rows.

    Attributes:
        own: The teacher of the rows with its own prompts.
        prompted: The training rows as it reads them.
    """

    own: Teacher
    prompted: PromptedRows

    def reader(self) -> OtherRows:
        """Return what makes the batches with its own prompts."""
        return OtherRows(self.prompted, self.own.reader())

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Return its logits at the same tokens."""
        theirs = self.prompted.sampled(batch) if batch.sampled else self.reader().of(batch)
        return self.own.logits(theirs, progress)

    def follow(self, student: nn.Module) -> None:
        """Let its own teacher learn the student's weights."""
        self.own.follow(student)

    def state_dict(self) -> dict[str, Tensor]:
        """Return those of its own teacher."""
        return self.own.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore those of its own teacher."""
        self.own.load_state_dict(state)
