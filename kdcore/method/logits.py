"""Logits at N masked positions: made a chunk at a time, from hidden states and a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.method.attention_maps import AttentionMaps
from kdcore.method.records import Batch


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
        states: Number of a hidden state -> [N, H], the ones that matchers read, part of the graph.
        maps: The attention that matchers read, part of the graph; None if none reads it.
    """

    hidden: Tensor
    head: Head
    classes: int
    states: Mapping[int, Tensor] = field(default_factory=dict)
    maps: AttentionMaps | None = None

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
class MovedLogits:
    """Logits of N masked positions that are computed on one device and read on another.

    Attributes:
        made: The logits on the device of their model.
        device: The device that reads them, a chunk at a time.
    """

    made: HiddenLogits
    device: torch.device

    @property
    def features(self) -> Tensor | None:
        """The hidden states [N, H], as in `HiddenLogits`."""
        features = self.made.features
        return None if features is None else features.to(self.device)

    @property
    def states(self) -> Mapping[int, Tensor]:
        """The hidden states that matchers read, where they were computed."""
        return self.made.states

    @property
    def maps(self) -> AttentionMaps | None:
        """The attention that matchers read, where it was computed."""
        return self.made.maps

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""
        return self.made.logits(chunk).to(self.device)


def no_teacher(batch: Batch) -> HiddenLogits:
    """The neutral teacher: logits of no classes, [N, 0], at a batch's N masked positions."""
    nothing = torch.empty(len(batch.positions), 0, device=batch.mask.device)
    return HiddenLogits(nothing, Head(), 0)
