"""How logits at masked positions are had: from a model, or from a drafter and its target.

The only fork in the path of the data.

A language model's body gives hidden states, and its head is applied later, chunk by chunk. A model
whose head cannot be taken off (a classifier, an unknown architecture) gives its logits at once and
has the identity for a head. Downstream of `HiddenLogits` nothing can tell which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.hidden_states import HiddenStates
from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.protocols import TrainedDrafter
from kdcore.method.records import Batch
from kdcore.models.features import FeatureTap, layer_count
from kdcore.models.head import _agrees, _captured, _decoder_of, head_of


class ModelView:
    """Runs a transformers model and gives the logits at a batch's masked positions.

    classes: V, how many of the model's classes take part.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        self.classes = classes
        self._decoder = self._removable_head = None
        decoder, head = _decoder_of(model), head_of(model)
        if decoder is not None and head is not None and _agrees(model, decoder, head):
            self._decoder, self._removable_head = decoder, head

    @property
    def takes_the_head_off(self) -> bool:
        """Whether logits are made chunk by chunk; else the model gives them whole."""
        return self._decoder is not None

    def __call__(self, model: Callable[..., Any], batch: Batch) -> HiddenLogits:
        """Run ``model``, which may be wrapped (DDP), on a batch; N = batch.mask.sum()."""
        if self._decoder is None or self._removable_head is None:
            logits = model(**batch.inputs).logits
            by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier has T = 1
            return HiddenLogits(by_position[batch.mask], Head(), self.classes)
        with _captured(self._decoder) as hidden:
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        return HiddenLogits(hidden[0][batch.mask], self._removable_head(), self.classes)


class DrafterView:
    """Runs a target once, and a drafter on what it read of it: logits at masked anchors.

    Both sides are the tokens that the drafter can propose. A batch's inputs are the sequences
    [B, T], its labels and mask the anchors' (`kdcore.data.anchors`), B * T rows of D positions.
    stored: the hidden states of the rows that will come, if they are read and not computed.

    Raises UserError for a target without a linear head, or, of one that has weights, whose logits
    are not what that head gives: they would be another teacher than the target is.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: TrainedDrafter,
        stored: HiddenStates | None = None,
    ) -> None:
        head = head_of(target)
        if head is None:
            raise UserError(
                f"{type(target).__name__} has no linear head, which a drafter's would be read by",
                "choose a causal language model whose head is one matrix",
            )
        self.drafter, self.target, self.head, self.stored = drafter, target, head, stored
        self.tap = FeatureTap(target, (*drafter.layers, layer_count(target)))
        if target.device.type != "meta" and not _agrees(target, self.tap.decoder, head):
            raise UserError(
                f"{type(target).__name__} makes its logits otherwise than by its head, and the "
                "scale and cap that its config tells",
                "choose another target: a drafter's teacher would not be what this one says",
            )

    def __call__(
        self, drafter: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, HiddenLogits]:
        """The drafter's logits, and the target's; ``drafter`` may be wrapped (DDP)."""
        tokens = batch.inputs["input_ids"]
        features, final = self.read(batch)
        drafted = drafter(tokens, features)
        hidden = drafted.flatten(0, 1)[batch.mask]

        rows, levels = batch.mask.nonzero(as_tuple=True)
        # Level i of anchor r predicts the token at r + 1 + i, as the target does at r + i.
        predicting = final.flatten(0, 1)[rows + levels + 1]
        vocabulary = self.drafter.vocabulary
        head = self.head() if vocabulary is None else self.head().rows(vocabulary)
        classes, _ = self.drafter.head.shape
        return (
            HiddenLogits(hidden, self.drafter.head, classes),
            HiddenLogits(predicting, head, classes),
        )

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The features [B, T, F] that the drafter reads, and the final hidden states [B, T, H]."""
        tokens = batch.inputs["input_ids"]
        if self.stored is not None:
            states = self.stored.read(batch.index.tolist(), tokens.shape[1]).to(tokens.device)
        else:
            with self.tap.listening() as heard:
                self.target(**batch.inputs, use_cache=False, logits_to_keep=1)
            states = self.tap.join(heard, tokens)
        features = len(self.drafter.layers) * states.shape[-1] // len(self.tap.layers)
        return states[..., :features], states[..., features:]
