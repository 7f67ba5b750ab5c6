"""Logits at N masked positions: made a chunk at a time, from hidden states and a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.method.protocols import Matcher
from kdcore.method.records import Batch

ALIGNED = "aligned"
"""The name in the figures of the share of a student's tokens at which a teacher with another
tokenizer is compared."""


@dataclass(frozen=True, slots=True)
class Head:
    """Map from a hidden state to logits: cap * tanh(scale * (W h + b) / cap).

    Attributes:
        weight: [V, H], or None for the identity.
        bias: [V], or None.
        scale: Factor of the linear output.
        cap: Soft cap of the logits; None for no tanh.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors of the head."""
        own = (self.weight, self.bias)
        return [tensor for tensor in own if tensor is not None and tensor.requires_grad]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H). Raises ValueError for the identity, which has neither."""
        if self.weight is None:
            raise ValueError("the identity has no shape")
        classes, width = self.weight.shape
        return classes, width

    def rows(self, classes: Tensor) -> Head:
        """The head of some classes [V'] only."""
        if self.weight is None:
            raise ValueError("the identity has no rows to choose from")
        bias = None if self.bias is None else self.bias[classes]
        return replace(self, weight=self.weight[classes], bias=bias)

    def linear(self, hidden: Tensor) -> Tensor:
        """[N, V] before scale and cap, in the dtype of the weight; the hidden when identity."""
        if self.weight is None:
            return hidden
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def finish(self, linear: Tensor) -> Tensor:
        """[N, V] float32 logits from what `linear` gave."""
        logits = linear.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class ComparedLayers(Protocol):
    """Layers of a forward pass that matchers compare."""

    def at(self, place: Tensor) -> Self:
        """The layers at other positions [N], each an index among those of the pass."""

    def distance(self, matcher: Matcher, teacher: Self, weights: Tensor, length: int) -> Tensor:
        """The weighted sum of a matcher's distances from the teacher's layers, with a graph.

        Args:
            matcher: What compares them.
            teacher: The teacher's layers.
            weights: [N] the weights of the learned positions.
            length: Number of positions whose attention maps exist at a time.
        """


class TeacherLogits(Protocol):
    """What the loss engine needs of a teacher, live (`HiddenLogits`) or cached."""

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""


@dataclass(frozen=True, slots=True)
class HiddenLogits:
    """Logits of N masked positions, computed on demand.

    Attributes:
        hidden: [N, H] hidden states, part of the body's graph.
        head: Head that maps them to logits.
        classes: V, the size of the shared vocabulary; the head's rows beyond it are padding.
        layers: The layers that matchers read, part of the graph; None if no matcher reads any.
    """

    hidden: Tensor
    head: Head
    classes: int
    layers: ComparedLayers | None = None

    @property
    def features(self) -> Tensor | None:
        """The hidden states [N, H] that a linear head reads; None where it cannot be taken off."""
        return None if self.head.weight is None else self.hidden

    def linear(self, chunk: slice) -> Tensor:
        """[C, V'] the head's linear output, without gradient."""
        with torch.no_grad():
            return self.head.linear(self.hidden[chunk])

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""
        with torch.no_grad():
            return self.from_linear(self.linear(chunk))

    def from_linear(self, linear: Tensor) -> Tensor:
        """[C, V] float32 logits from a `linear` output."""
        return self.head.finish(linear)[:, : self.classes]


@dataclass(frozen=True, slots=True)
class RepeatedLogits:
    """Logits of N masked positions of which many are equal: each is computed once in a chunk.

    Attributes:
        once: The U different logits.
        place: [N] int64, the index among them of each position; near for near positions.
        place_on_cpu: [N] int64, the same on the CPU.
    """

    once: TeacherLogits
    place: Tensor
    place_on_cpu: Tensor

    @property
    def features(self) -> Tensor | None:
        """The hidden states [N, H], as in `HiddenLogits`."""
        features: Tensor | None = getattr(self.once, "features", None)
        return None if features is None else features[self.place]

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""
        place = self.place_on_cpu[chunk]
        first, last = (int(place.min()), int(place.max())) if len(place) else (0, -1)
        return self.once.logits(slice(first, last + 1))[self.place[chunk] - first]


@dataclass(frozen=True, slots=True)
class AlignedLogits(RepeatedLogits):
    """Logits of a teacher with another tokenizer at the student's N learned positions.

    The learned tokens of both are cut into spans: a span ends where both tokenizations have a
    border in the same text. The two distributions are compared at one position of each span, and
    the engine gives the student's other positions the weight 0. A token of the student without a
    counterpart is a span of its own, which is not compared.

    ``once`` has its logits at its own M learned positions, and ``place`` the one that each of the
    student's is compared with: not decreasing within a row, and any where nothing is compared.

    Attributes:
        labels: [M] int64, the teacher's tokens there.
        own_span: [M] int64, the number of the span of each, or -1 for a token without counterpart.
        span: [N] int64, the number of the span of each of the student's positions, not decreasing.
        span_on_cpu: [N] int64, the same on the CPU.
        compared: [N] bool, the positions at which the distributions are compared.
    """

    labels: Tensor
    own_span: Tensor
    span: Tensor
    span_on_cpu: Tensor
    compared: Tensor

    @property
    def layers(self) -> ComparedLayers | None:
        """The layers that matchers read, as in `kdcore.method.logits.HiddenLogits`."""
        own: ComparedLayers | None = getattr(self.once, "layers", None)
        return None if own is None else own.at(self.place)

    @torch.no_grad()
    def rest(self, tau: float, length: int) -> Tensor:
        """The log-prob of what a span has beside the token that is compared.

        Args:
            tau: Temperature.
            length: Number of positions whose logits exist at a time.

        Returns:
            [N] float32, the sum of the teacher's log-probs of the other tokens of its span.
        """
        logp = torch.zeros(len(self.labels), device=self.labels.device)
        for chunk in cuts(len(self.labels), length):
            scaled = (self.once.logits(chunk) / tau).log_softmax(-1)
            logp[chunk] = scaled.gather(-1, self.labels[chunk, None])[:, 0]
        spans = int(self.span_on_cpu[-1]) + 1 if len(self.span_on_cpu) else 0
        whole = logp.new_zeros(spans + 1)  # the last one for tokens without counterpart
        whole.index_add_(0, self.own_span.where(self.own_span >= 0, spans), logp)
        rest = whole[self.span] - logp[self.place]
        return rest.where(self.compared, 0.0).clamp(max=0.0)


def no_teacher(batch: Batch) -> HiddenLogits:
    """The neutral teacher: logits of no classes, [N, 0], at a batch's N masked positions."""
    nothing = torch.empty(len(batch.positions), 0, device=batch.mask.device)
    return HiddenLogits(nothing, Head(), 0)


def cuts(count: int, length: int, uncut: Tensor | None = None) -> Iterator[slice]:
    """Cut N positions into chunks.

    Args:
        count: N.
        length: Number of positions of a chunk; a chunk that would end inside a group is longer.
        uncut: [N] int64 on the CPU, the number of each position's group; None without groups.

    Yields:
        The places of the chunks.
    """
    start = 0
    while start < count:
        end = min(start + length, count)
        while uncut is not None and end < count and uncut[end] == uncut[end - 1]:
            end += 1
        yield slice(start, end)
        start = end
