"""How logits at masked positions are had: from a model, or from a drafter and its target.

The only fork in the path of the data.

A language model's body gives hidden states, and its head is applied later, chunk by chunk. A model
whose head cannot be taken off (a classifier, an unknown architecture) gives its logits at once and
has the identity for a head. Downstream of `HiddenLogits` nothing can tell which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.hidden_states import HiddenStates
from kdcore.data.teacher_cache import TeacherCache
from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits, TeacherLogits, no_teacher
from kdcore.method.protocols import TrainedDrafter
from kdcore.method.records import Batch
from kdcore.models.anatomy import decoder_of, head_of, layer_count
from kdcore.models.features import FeatureTap
from kdcore.models.head import body_and_head_agree, last_hidden_states


class View(Protocol):
    """What the Trainer asks of what it trains: both models' logits at masked positions."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """The logits of the trained model, which may be wrapped (DDP), and its teacher's."""

    def reference(self, batch: Batch) -> TeacherLogits | None:
        """The logits of the third model that gates ask for; None where they ask for none."""


class ModelView:
    """Runs a transformers model and gives the logits at a batch's masked positions.

    classes: V, how many of the model's classes take part.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        self.classes = classes
        self._decoder = self._removable_head = None
        decoder, head = decoder_of(model), head_of(model)
        if decoder is not None and head is not None and body_and_head_agree(model, decoder, head):
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
        with last_hidden_states(self._decoder) as hidden:
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        return HiddenLogits(hidden[0][batch.mask], self._removable_head(), self.classes)


class StudentView:
    """Runs a student, and beside it a teacher that is live, cached, or absent.

    Args:
        student: The model that is trained.
        classes: V, how many classes take part.
        teacher: The live teacher, or None.
        reference: The third model that gates ask for, or None.
        cache: Where training reads the teacher's logits from, live teacher or not; None for live.
        keys: For each training row, its key in the cache.
    """

    def __init__(
        self,
        student: nn.Module,
        classes: int,
        *,
        teacher: nn.Module | None = None,
        reference: nn.Module | None = None,
        cache: TeacherCache | None = None,
        keys: Sequence[bytes] = (),
    ) -> None:
        self.student = ModelView(student, classes)
        self._teacher = None if teacher is None else (ModelView(teacher, classes), teacher)
        self._reference = None if reference is None else (ModelView(reference, classes), reference)
        self._cache, self._keys = cache, keys

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """The student's logits, and the teacher's for this batch of training rows."""
        return self.student(model, batch), self._taught(batch)

    def teacher(self, batch: Batch) -> HiddenLogits | None:
        """The live teacher's logits, for any rows; None where there is no live teacher."""
        return _without_gradient(self._teacher, batch)

    def reference(self, batch: Batch) -> HiddenLogits | None:
        """The reference model's logits; None where gates ask for none."""
        return _without_gradient(self._reference, batch)

    def _taught(self, batch: Batch) -> TeacherLogits:
        if self._cache is not None:
            keys = [self._keys[place] for place in batch.index.tolist()]
            return self._cache.logits(keys, batch.mask.device)
        return self.teacher(batch) or no_teacher(batch)


@torch.no_grad()
def _without_gradient(
    viewed: tuple[ModelView, nn.Module] | None, batch: Batch
) -> HiddenLogits | None:
    return None if viewed is None else viewed[0](viewed[1], batch)


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
        if target.device.type != "meta" and not body_and_head_agree(target, self.tap.decoder, head):
            raise UserError(
                f"{type(target).__name__} makes its logits otherwise than by its head, and the "
                "scale and cap that its config tells",
                "choose another target: a drafter's teacher would not be what this one says",
            )

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, HiddenLogits]:
        """The logits of the drafter ``model``, which may be wrapped (DDP), and the target's."""
        tokens = batch.inputs["input_ids"]
        features, final = self.read(batch)
        drafted = model(tokens, features)
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

    def reference(self, batch: Batch) -> None:
        """No drafter is trained beside a third model."""

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
