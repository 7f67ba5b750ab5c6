"""A model with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from kdcore.models.device import put
from kdcore.models.folder.config import MULTI_LABEL


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model: The transformers model.
        tokenizer: The transformers tokenizer; `kdcore.models.loading.load.NoTokenizer` for an image
            model.
        name: Name of the model in messages.
        digest: sha256 of the config, weights and quantisation; for a student, before training.
        kind: The transformers class that loads it, e.g. AutoModelForSequenceClassification.
        files: The same without the quantisation, which identifies the target of a drafter; None
            where it equals ``digest``.
        placed: Whether the model has a place of its own, which `to` does not change.
        bytes: Memory of the weights of a model on the meta device, where they will be quantised.
        cut_from: Number of layers of the model that a student was cut from; None for a whole model.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    digest: str
    kind: Any = AutoModelForCausalLM
    files: str | None = None
    placed: bool = False
    bytes: int | None = None
    cut_from: int | None = None

    @property
    def labels(self) -> dict[int, str]:
        """The labels of a classifier by class; empty for a language model."""
        config: Any = self.model.config
        return {} if self._head() is not None else config.id2label

    @property
    def multi_label(self) -> bool:
        """Whether it is a classifier that gives each label a probability of its own."""
        config: Any = self.model.config
        return bool(self.labels) and config.problem_type == MULTI_LABEL

    @property
    def classes(self) -> int:
        """The width V of the logits: the number of labels, or of rows in the head.

        It is 2 for a classifier with several labels: absent and present, at a position each.
        """
        head = self._head()
        if head is not None:
            return int(head.weight.shape[0])
        return 2 if self.multi_label else len(self.labels)

    def to(self, device: torch.device) -> None:
        """Move the model to a device, unless it has a place of its own."""
        if not self.placed:
            put(self.model, device)

    @property
    def weight_bytes(self) -> int:
        """The memory of the weights in bytes."""
        held = {True: 0, False: 0}
        for parameter in self.model.parameters():
            held[parameter.requires_grad] += parameter.numel() * parameter.element_size()
        return held[True] + (held[False] if self.bytes is None else self.bytes)

    @property
    def has_weights(self) -> bool:
        """Whether the model has weights, rather than shapes only (on the meta device)."""
        return self.model.device.type != "meta"

    def _head(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[no-untyped-call]


def in_order(labels: Mapping[int, str]) -> list[str]:
    """The labels of a classifier in the order of their classes."""
    return [labels[place] for place in sorted(labels)]


def first_few(names: list[str]) -> str:
    """The first three names, joined for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
