"""The masked positions of a batch, whose logits exist a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcore.method.logits import HiddenLogits, TeacherLogits, cuts
from kdcore.method.records import Batch, LogitBatch, SampledTokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of C masked positions, without a graph.

    Attributes:
        place: Place of the chunk among the N positions.
        linear: [C, V'] the linear output of the student's head.
        logits: Logits of the chunk as B = 1, which the gates read.
    """

    place: slice
    linear: Tensor
    logits: LogitBatch


@dataclass(frozen=True, slots=True)
class LearnedChunk:
    """The positions of a chunk that the loss keeps, with a graph.

    Attributes:
        place: As in `Chunk`.
        kept: [C] bool, the positions of the chunk that are kept; a slice for all of them.
        hidden: [C', H] the student's hidden states, a leaf of the graph.
        linear: [C', V'] the linear output of the student's head, a leaf too since it is known; None
            for the identity.
        logits: Logits as B = 1, those of the student with the graph.
    """

    place: slice
    kept: Tensor | slice
    hidden: Tensor
    linear: Tensor | None
    logits: LogitBatch


@dataclass(frozen=True, slots=True)
class MaskedPositions:
    """The N masked positions of a batch, row after row.

    Attributes:
        student: Logits of the student.
        teacher: Logits of the teacher.
        reference: Logits of a third model, which only gates read.
        labels: [N] int64.
        places: [N] int64, the index of each position in its row.
        progress: As in `kdcore.method.records.LogitBatch`, like the next two.
        generator: Source of what is drawn, on the logits' device.
        batch: The batch.
        uncut: [N] int64 on the CPU: a chunk does not end between two positions of one number.
        span: [N] int64, see `kdcore.method.records.LogitBatch`.
        teacher_rest: [N] float, likewise.
        softening: [N] float, likewise.
        advantage: [N] float, likewise.
    """

    student: HiddenLogits
    teacher: TeacherLogits
    reference: TeacherLogits | None
    labels: Tensor
    places: Tensor
    progress: float
    generator: torch.Generator
    batch: Batch
    uncut: Tensor | None = None
    span: Tensor | None = None
    teacher_rest: Tensor | None = None
    softening: Tensor | None = None
    advantage: Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        student: HiddenLogits,
        teacher: TeacherLogits,
        reference: TeacherLogits | None,
        progress: float,
        generator: torch.Generator,
    ) -> MaskedPositions:
        """The masked positions of a batch; the arguments are named as the attributes."""
        positions = batch.positions
        places = positions % batch.mask.shape[1]
        labels = batch.labels.flatten()[positions]
        return cls(student, teacher, reference, labels, places, progress, generator, batch)

    @property
    def row_lengths(self) -> list[int]:
        """The number of masked positions of each row that has one."""
        rows = self.batch.positions_on_cpu // self.batch.mask.shape[1]
        lengths = rows.bincount()
        found: list[int] = lengths[lengths > 0].tolist()
        return found

    def chunks(self, length: int) -> Iterator[Chunk]:
        """Cut the positions into chunks.

        Args:
            length: Number of positions of a chunk; see `cuts`.

        Yields:
            The chunks.
        """
        for place in cuts(len(self.labels), length, self.uncut):
            linear = self.student.linear(place)
            labels = self.labels[None, place]
            third = self.reference
            logits = LogitBatch(
                self.student.from_linear(linear)[None],
                self.teacher.logits(place)[None],
                labels,
                torch.ones_like(labels, dtype=torch.bool),
                self.progress,
                self.generator,
                self.places[None, place],
                reference=None if third is None else third.logits(place)[None],
                sampled=self.batch.sampled,
            )
            yield Chunk(place, linear, logits)

    def learned(self, chunk: Chunk, kept: Tensor | slice, features: Tensor | None) -> LearnedChunk:
        """Attach a graph to the positions of a chunk that the loss keeps.

        Args:
            chunk: The chunk.
            kept: [C] bool, the positions that are kept; a slice for all of them.
            features: [N, H] hidden states of the teacher; None without.

        Returns:
            The positions, whose student's logits have a graph down to two leaves.
        """
        place, known = chunk.place, chunk.logits
        hidden = self.student.hidden[place][kept].detach().requires_grad_()
        identity = self.student.head.weight is None
        linear = None if identity else chunk.linear[kept].detach().requires_grad_()
        with torch.enable_grad():
            student = self.student.from_linear(hidden if linear is None else linear)[None]

        def of_kept(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[None, place][:, kept]

        logits = replace(
            known,
            student=student,
            teacher=known.teacher[:, kept],
            labels=known.labels[:, kept],
            mask=known.mask[:, kept],
            position=known.position[:, kept],
            student_hidden=None if self.student.features is None else hidden[None],
            teacher_hidden=None if features is None else features[place][kept].detach()[None],
            reference=None,
            span=of_kept(self.span),
            teacher_rest=of_kept(self.teacher_rest),
            softening=of_kept(self.softening),
            advantage=of_kept(self.advantage),
        )
        return LearnedChunk(place, kept, hidden, linear, logits)

    @torch.no_grad()
    def sampled_tokens(self, length: int) -> SampledTokens:
        """Look up what both models say of the labels, which were sampled.

        Args:
            length: Number of positions whose logits exist at a time.

        Returns:
            The tokens, padded as the batch is.
        """
        batch = self.batch
        student, teacher = torch.zeros(2, batch.mask.numel(), device=batch.mask.device)
        for chunk in self.chunks(length):
            place = batch.positions[chunk.place]
            student[place] = _of_labels(chunk.logits.student, chunk.logits.labels)
            teacher[place] = _of_labels(chunk.logits.teacher, chunk.logits.labels)
        importance = torch.ones_like(student)
        if batch.teacher_share:
            of_teacher = math.log(batch.teacher_share) + teacher
            of_student = math.log1p(-batch.teacher_share) + student
            importance = (student - torch.logaddexp(of_teacher, of_student)).exp()
        student, teacher, importance = (
            each.view(batch.mask.shape) for each in (student, teacher, importance)
        )
        return SampledTokens(student, teacher, importance, batch.mask, self.progress)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """[C] the log-probs of labels [1, C] under logits [1, C, V]."""
    return logits.log_softmax(-1).gather(-1, labels[..., None])[0, :, 0]
