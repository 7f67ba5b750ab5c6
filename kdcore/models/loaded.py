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


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer.

    tokenizer: of transformers; an image model has `kdcore.models.loading.NoTokenizer`.
    digest: sha256 of the config and weights it came from; of a student, before training.
    kind: the transformers class that loads it, e.g. AutoModelForSequenceClassification.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    digest: str
    kind: Any = AutoModelForCausalLM

    @property
    def labels(self) -> dict[int, str]:
        """A classifier's labels by class; a language model has none."""
        config: Any = self.model.config
        return {} if self._head() is not None else config.id2label

    @property
    def classes(self) -> int:
        """V, the width of its logits: a classifier's labels, or the rows of the head."""
        head = self._head()
        return len(self.labels) if head is None else int(head.weight.shape[0])

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        model: Any = self.model
        model.to(device)

    @property
    def has_weights(self) -> bool:
        """Whether it computes, or only has sizes."""
        return self.model.device.type != "meta"

    def _head(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[no-untyped-call]


def in_order(labels: Mapping[int, str]) -> list[str]:
    """A classifier's labels, by class."""
    return [labels[place] for place in sorted(labels)]


def first_few(names: list[str]) -> str:
    """At most three names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
