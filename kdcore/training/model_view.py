"""The logits of a transformers model at a batch's masked positions.

A language model's body returns hidden states, and its head is applied later, chunk by chunk. A
model whose head cannot be separated (a classifier, an unknown architecture) returns its logits at
once, with the identity as head. Code that reads `HiddenLogits` cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.method.logits import ComparedLayers, Head, HiddenLogits
from kdcore.method.records import Batch
from kdcore.models.anatomy import decoder_of, head_of
from kdcore.models.device import sent
from kdcore.models.features import FeatureTap
from kdcore.models.folder.config import MULTI_LABEL
from kdcore.models.matching.attention import AttentionTap
from kdcore.models.matching.layers import PassLayers, Queries
from kdcore.models.probes import body_and_head_agree, last_hidden_states, running


@dataclass(frozen=True, slots=True)
class Matched:
    """What of a model's forward pass matchers read.

    Attributes:
        states: Numbers of hidden states, in increasing order; see `StateSizes`.
        layers: Numbers from 1 of the layers whose attention they read, likewise.
        values: Whether they read the values of these layers too.
    """

    states: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    values: bool = False


class ModelView:
    """The logits of a transformers model at a batch's masked positions.

    Args:
        model: The model.
        classes: V, the number of the model's classes that are compared.
        matched: What matchers read.
    """

    def __init__(self, model: nn.Module, classes: int, matched: Matched | None = None) -> None:
        self.classes = classes
        language_model, read = cast(PreTrainedModel, model), matched or Matched()
        self._tap = FeatureTap(language_model, read.states) if read.states else None
        self._attention = (
            AttentionTap(model, read.layers, values=read.values) if read.layers else None
        )
        read_any = read.states or read.layers
        self._generates = not read_any or language_model.can_generate()
        self._decoder = self._removable_head = None
        decoder, head = decoder_of(model), head_of(model)
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        self._multi_label = head is None and problem == MULTI_LABEL
        if decoder is not None and head is not None and body_and_head_agree(model, decoder, head):
            self._decoder, self._removable_head = decoder, head

    @property
    def takes_the_head_off(self) -> bool:
        """Whether the head is applied chunk by chunk; otherwise the model returns all logits."""
        return self._decoder is not None

    def __call__(self, model: Callable[..., Any], batch: Batch) -> HiddenLogits:
        """Run a model on a batch.

        Args:
            model: The model, which may be wrapped (DDP).
            batch: The batch, with N = batch.mask.sum() masked positions.

        Returns:
            The hidden states [N, H] and the head, or the logits [N, V] and the identity.
        """
        with ExitStack() as taps:
            heard = taps.enter_context(self._tap.listening()) if self._tap else {}
            watched = taps.enter_context(self._attention.listening()) if self._attention else {}
            taps.enter_context(running(model))
            logits = self._run(model, batch)
        lengths = [each.shape[1] for each in heard.values()]
        lengths += [each.query.shape[2] for each in watched.values()]
        if not lengths:
            return logits
        queries, at = (_learned if self._generates else _of_whole_rows)(batch, lengths[0])
        # a teacher may be on other devices
        states = {n: each.flatten(0, 1)[at.to(each.device)] for n, each in heard.items()}
        return replace(logits, layers=PassLayers(states, queries, watched))

    def _run(self, model: Callable[..., Any], batch: Batch) -> HiddenLogits:
        if self._decoder is None or self._removable_head is None:
            # transformers sees that rows are packed only where there is no cache
            cacheless = {} if batch.starts is None else {"use_cache": False}
            logits = model(**batch.inputs, **cacheless).logits
            if self._multi_label:  # a position for each label: its sigmoid is a softmax of two
                logits = torch.stack([torch.zeros_like(logits), logits], -1)
            by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier has T = 1
            learned = by_position.flatten(0, 1)[batch.positions_in_inputs.to(logits.device)]
            return HiddenLogits(learned, Head(), self.classes)
        with last_hidden_states(self._decoder) as hidden:
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        head, states = self._removable_head(), hidden[0].flatten(0, 1)
        assert head.weight is not None  # that of a linear layer
        # a model that is spread over devices may keep body and head on two of them
        learned = states[batch.positions_in_inputs.to(states.device)].to(head.weight.device)
        return HiddenLogits(learned, head, self.classes)


def _learned(batch: Batch, length: int) -> tuple[Queries, Tensor]:
    """The learned positions, in sequences of ``length`` positions, and their flat indices [M]."""
    here, at = batch if batch.on_cpu is None else batch.on_cpu, batch.positions_in_inputs
    counts = (here.positions_in_inputs // length).bincount()
    return Queries(tuple(counts.tolist()), at % length), at


def _of_whole_rows(batch: Batch, length: int) -> tuple[Queries, Tensor]:
    """The same of all positions but the padding: a classifier learns the label of a whole row."""
    here, device = batch if batch.on_cpu is None else batch.on_cpu, batch.mask.device
    rows = batch.positions // batch.mask.shape[1]
    whole = torch.ones(len(here.mask), length, dtype=torch.bool, device=here.mask.device)
    there = here.inputs.get("attention_mask", whole)  # images have none
    at = sent(there.flatten().nonzero()[:, 0], device)
    return Queries(tuple(there.sum(1).tolist()), at % length, rows), at


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
    def layers(self) -> ComparedLayers | None:
        """What matchers read, where it was computed."""
        return self.made.layers

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""
        return self.made.logits(chunk).to(self.device)


@torch.no_grad()
def frozen_logits(
    view: ModelView, model: PreTrainedModel, batch: Batch
) -> HiddenLogits | MovedLogits:
    """The logits of a frozen model, which may be on another device than the batch.

    Args:
        view: The view of the model.
        model: The model.
        batch: The batch, with N masked positions.

    Returns:
        The logits [N, V], read on the device of the batch.
    """
    device, there = batch.mask.device, model.device
    # the host waits for the copies: the CPU would read one that is under way
    inputs = {name: each.to(there) for name, each in batch.inputs.items()}
    made = view(model, replace(batch, inputs=inputs))
    return made if made.hidden.device == device else MovedLogits(made, device)
