"""Frozen records that components exchange, and the legend of shape letters.

Shape letters, used as suffixes of tensor names and in every docstring:

| letter | count of |
| --- | --- |
| B | rows: a sequence, a classifier's example (T = 1), or a drafter's anchor (T = D) |
| T | positions in a row |
| V | classes (the vocabulary, or the labels of a classifier) |
| K | classes of one part of the distillation loss |
| D | draft depth: tokens that a drafter looks ahead |
| N | nodes of a draft tree, or masked positions of a batch laid flat |
| H | width of a hidden state |

No code downstream of a view depends on the kind of row, and rows and positions are independent
until the loss engine reduces them. Hence a record may hold a whole batch, or a chunk of its masked
positions with B = 1 and T = the chunk's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError

LOG_ZERO = -1e4
"""Finite substitute for log 0: its exp is exactly 0 in float32, and it never causes a NaN."""


def of_shape(found: Any, shape: Sequence[int], by: str, what: str) -> Tensor:
    """What a component returned; a shape that broadcasts would train without a word.

    Args:
        found: What it returned.
        shape: The shape that was asked for.
        by: The component in the message, e.g. "gate 'speckd'".
        what: What it returns, e.g. "weights".

    Returns:
        ``found``.

    Raises:
        UserError: It is no tensor, or one of another shape.
    """
    if isinstance(found, Tensor) and found.shape == torch.Size(shape):
        return found
    a_tensor = isinstance(found, Tensor)
    got = f"shape {list(found.shape)}" if a_tensor else f"type {type(found).__name__}"
    raise UserError(
        f"{by} returned {what} of {got}, expected a tensor of shape {list(shape)}",
        f"correct {by}; `kdcore plugins check PACKAGE` tests an installed package",
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded example, not yet padded.

    Attributes:
        inputs: Arguments of the model's forward, without the batch dimension.
        labels: [T] int64, already shifted: ``labels[t]`` is the class to predict at position t.
        mask: [T] bool, the positions to train on (a response with its end token).
        id: Name of the example in messages.
        notes: Sentences about the example for the user, e.g. about a part that is not in the row.
        teacher: What the data says of the row's teacher, where a run has several: a name, or JSON
            text of weights by name; empty if it says nothing.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    mask: Tensor
    id: str
    notes: tuple[str, ...] = ()
    teacher: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded to one length.

    Attributes:
        inputs: Keyword arguments of the model, each [B, ...]; of packed rows [P, ...], P sequences
            of several rows each (see `kdcore.data.batching.packing`).
        labels: [B, T] int64, as in `Row`.
        mask: [B, T] bool, as in `Row`.
        index: [B] int64 on the CPU, the indices of the rows in the data set.
        learned: [N] int64, the indices of the masked positions in the flattened mask; None to find
            them when they are read, for which the host waits unless the mask is on the CPU.
        sampled: Whether the responses were sampled during the training, and replace the data's.
        starts: [B] int64 on the CPU, of packed rows the index of each row's first position in the
            flattened inputs; None if the rows are not packed.
        learned_in_inputs: [N] int64, of packed rows the indices of the masked positions in the
            flattened inputs; None if the rows are not packed.
        teachers: The ``teacher`` of each row, see `Row`; empty if no row has one.
        on_cpu: The same batch on the CPU, which the host reads without waiting for the device; None
            for a batch on the CPU, and where nobody kept it.
        teacher_share: Share of the teacher in the distribution that sampled the responses; the rest
            is the student's.
        stored: What the loader has read for the teacher of these rows, which knows its form; None
            where the teacher has to read it.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    mask: Tensor
    index: Tensor
    learned: Tensor | None = None
    sampled: bool = False
    starts: Tensor | None = None
    learned_in_inputs: Tensor | None = None
    teachers: tuple[str, ...] = ()
    on_cpu: Batch | None = None
    teacher_share: float = 0.0
    stored: Any = None

    @property
    def positions(self) -> Tensor:
        """[N] int64, the indices of the masked positions in the flattened mask."""
        return self.mask.flatten().nonzero()[:, 0] if self.learned is None else self.learned

    @property
    def positions_on_cpu(self) -> Tensor:
        """[N] int64, the same on the CPU."""
        return self.positions.cpu() if self.on_cpu is None else self.on_cpu.positions

    @property
    def positions_in_inputs(self) -> Tensor:
        """[N] int64, the indices of the masked positions in the flattened inputs."""
        return self.positions if self.learned_in_inputs is None else self.learned_in_inputs


@dataclass(frozen=True, slots=True)
class LogitBatch:
    """Input of gates, splitters and divergences.

    Attributes:
        student: [B, T, V] float logits at temperature 1, with gradient while a loss is computed.
        teacher: [B, T, V] float logits at temperature 1, detached.
        labels: [B, T] int64.
        mask: [B, T] bool.
        progress: Share of the training done, in [0, 1].
        generator: Only source of randomness, on the logits' device, one for each gate. It is
            reseeded for each batch from the run's seed and the step, so that a resumed run draws
            the same numbers as an uninterrupted one.
        position: [B, T] int64, the index of each position in its row, from 0; for the anchor of a
            drafter, the number of tokens between it and the predicted token.
        student_hidden: [B, T, H] hidden states that the student's head reads; None while a gate is
            computed.
        teacher_hidden: [B, T, H] hidden states that the teacher's head reads, detached; None while
            a gate is computed, and for a teacher without hidden states.
        reference: [B, T, V] float logits at temperature 1 of a third model, detached; None unless
            a gate names one (see `kdcore.method.protocols.Gate`), and while a loss is computed.
        sampled: As in `Batch`.
        span: [B, T] int64, the number of the span of text that each label belongs to, for a teacher
            with another tokenizer (see `kdcore.method.logits`); None where no splitter reads it.
        teacher_rest: [B, T] float, the teacher's log-prob, at the temperature of the loss, of the
            other tokens of the span than the one that ``teacher`` predicts; None as ``span``.
        softening: [B, T] float, the factor of the loss temperature at each position; None without a
            gate that sets it, and while a gate is computed.
        advantage: [B, T] float of either sign, the advantage of each label as a sampled token; None
            without a component that computes it, on the data's responses, and while a gate is
            computed.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    mask: Tensor
    progress: float
    generator: torch.Generator
    position: Tensor
    student_hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reference: Tensor | None = None
    sampled: bool = False
    span: Tensor | None = None
    teacher_rest: Tensor | None = None
    softening: Tensor | None = None
    advantage: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens of whole responses that were sampled during the training.

    Attributes:
        student: [B, T] float32 log-probs of the tokens under the student, at temperature 1 and
            detached.
        teacher: [B, T] float32, the same under the teacher.
        importance: [B, T] float32, the student's probability of each token divided by that of the
            distribution that sampled it; 1 where the student sampled.
        mask: [B, T] bool, the tokens of the responses; elsewhere the log-probs are 0.
        progress: Share of the training done, in [0, 1].
    """

    student: Tensor
    teacher: Tensor
    importance: Tensor
    mask: Tensor
    progress: float


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the distillation loss: a K-way pair of logits at each position.

    Attributes:
        student: [B, T, K] float logits, already divided by the loss temperature tau; excluded
            classes have `LOG_ZERO`, so their probability is exactly 0.
        teacher: [B, T, K] float logits, likewise.
        weight: [B, T] float factor of this part's divergence at each position, detached.
        log_probs: Whether student and teacher are log-probs, which are compared as they are: the
            probabilities of a position may then sum to less than 1.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor
    log_probs: bool = False

    @property
    def compared(self) -> tuple[Tensor, Tensor]:
        """What the divergence compares: the log-probs [B, T, K] of student and teacher."""
        if self.log_probs:
            return self.student, self.teacher
        return self.student.log_softmax(-1), self.teacher.log_softmax(-1)


@dataclass(frozen=True, slots=True)
class StateSizes:
    """The sizes of a model's hidden states and attention.

    Attributes:
        layers: Number of layers L. There are L + 1 hidden states: number 0 is the embedding, number
            i the output of layer i, and number L the output of the final norm.
        width: H.
        heads: Number of query heads of the attention of a layer; 0 without one that all share.
        key_heads: Number of its key and value heads, likewise.
    """

    layers: int
    width: int
    heads: int = 0
    key_heads: int = 0
