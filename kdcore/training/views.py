"""Views: the logits at masked positions, of a model or of a drafter and its target.

This is the only place where the code for students and drafters differs.

A language model's body returns hidden states, and its head is applied later, chunk by chunk. A
model whose head cannot be separated (a classifier, an unknown architecture) returns its logits at
once, with the identity as head. Code that reads `HiddenLogits` cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.alignment.paired_rows import PairedRows
from kdcore.data.hidden_states import HiddenStates
from kdcore.data.responses.served_teacher import ServedTeacher
from kdcore.data.teacher_cache import TeacherCache
from kdcore.decoding.protocols import TrainedDrafter
from kdcore.errors import UserError
from kdcore.method.logits import (
    Head,
    HiddenLogits,
    MovedLogits,
    RepeatedLogits,
    TeacherLogits,
    no_teacher,
)
from kdcore.method.records import Batch
from kdcore.models.anatomy import decoder_of, head_of, layer_count
from kdcore.models.device import sent
from kdcore.models.features import FeatureTap
from kdcore.models.loaded import MULTI_LABEL
from kdcore.models.probes import body_and_head_agree, last_hidden_states


class View(Protocol):
    """The logits that the Trainer needs: those of the trained model and of its teacher."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """Return the logits [N, V] of both models at the N masked positions.

        Args:
            model: The trained model, which may be wrapped (DDP).
            batch: The batch of training rows.

        Returns:
            The trained model's logits and the teacher's.
        """

    def reference(self, batch: Batch) -> TeacherLogits | None:
        """Return the logits of the reference model that gates name; None without one."""


class ModelView:
    """The logits of a transformers model at a batch's masked positions.

    Args:
        model: The model.
        classes: V, the number of the model's classes that are compared.
        states: The numbers of the hidden states that matchers read.
    """

    def __init__(self, model: nn.Module, classes: int, states: tuple[int, ...] = ()) -> None:
        self.classes = classes
        language_model = cast(PreTrainedModel, model)
        self._tap = FeatureTap(language_model, states) if states else None
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
        if self._tap is None:
            return self._run(model, batch)
        with self._tap.listening() as heard:
            logits = self._run(model, batch)
        states = {n: each.flatten(0, 1)[batch.positions] for n, each in heard.items()}
        return replace(logits, states=states)

    def _run(self, model: Callable[..., Any], batch: Batch) -> HiddenLogits:
        if self._decoder is None or self._removable_head is None:
            logits = model(**batch.inputs).logits
            if self._multi_label:  # a position for each label: its sigmoid is a softmax of two
                logits = torch.stack([torch.zeros_like(logits), logits], -1)
            by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier has T = 1
            learned = by_position.flatten(0, 1)[batch.positions.to(logits.device)]
            return HiddenLogits(learned, Head(), self.classes)
        with last_hidden_states(self._decoder) as hidden:
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        head, states = self._removable_head(), hidden[0].flatten(0, 1)
        assert head.weight is not None  # that of a linear layer
        # a model that is spread over devices may keep body and head on two of them
        learned = states[batch.positions.to(states.device)].to(head.weight.device)
        return HiddenLogits(learned, head, self.classes)


class StudentView:
    """The logits of a student and of its teacher, which is live, cached, served, or absent.

    Args:
        student: The model that is trained.
        classes: V, the number of classes that are compared; the student's, if ``paired`` is set.
        teacher: The live teacher, or None.
        reference: The reference model that gates name, or None.
        cache: The cache that training reads instead of a live teacher, or None.
        keys: The key in the cache of each training row, as the teacher reads it.
        paired: The training rows as a teacher with another tokenizer reads them, or None. Such a
            teacher has no logits at the positions of other rows.
        teacher_classes: The number of the teacher's classes (default: ``classes``).
        states: The numbers of the hidden states of student and teacher that matchers read.
        served: The servers that training reads instead of a live teacher, or None.
    """

    def __init__(
        self,
        student: nn.Module,
        classes: int,
        *,
        teacher: PreTrainedModel | None = None,
        reference: PreTrainedModel | None = None,
        cache: TeacherCache | None = None,
        keys: Sequence[bytes] = (),
        paired: PairedRows | None = None,
        teacher_classes: int | None = None,
        states: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        served: ServedTeacher | None = None,
    ) -> None:
        ours_read, theirs_read = states
        self.student = ModelView(student, classes, ours_read)
        theirs = classes if teacher_classes is None else teacher_classes
        viewed = None if teacher is None else (ModelView(teacher, theirs, theirs_read), teacher)
        self._teacher = viewed
        self._reference = None if reference is None else (ModelView(reference, classes), reference)
        self._cache, self._keys = cache, keys
        self._paired, self._served = paired, served

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """Return the student's and the teacher's logits for a batch of training rows."""
        return self.student(model, batch), self._taught(batch)

    def teacher(self, batch: Batch) -> TeacherLogits | None:
        """Return the live teacher's logits for any rows, in the student's tokens.

        None without a live teacher, and with one of another tokenizer.
        """
        return None if self._paired is not None else _without_gradient(self._teacher, batch)

    def reference(self, batch: Batch) -> TeacherLogits | None:
        """Return the reference model's logits; None without a reference model."""
        return _without_gradient(self._reference, batch)

    def _taught(self, batch: Batch) -> TeacherLogits:
        if self._paired is None:
            return self._own(batch)
        theirs = self._paired.batch(batch)
        return self._paired.aligned(batch, theirs, self._own(theirs))

    def _own(self, batch: Batch) -> TeacherLogits:
        """The teacher's logits at the learned positions of rows in its own tokens."""
        if self._cache is not None:
            keys = [self._keys[place] for place in batch.index.tolist()]
            return self._cache.logits(keys, batch.mask.device)
        if self._served is not None:
            return self._served.logits(batch)
        return _without_gradient(self._teacher, batch) or no_teacher(batch)


@torch.no_grad()
def _without_gradient(
    viewed: tuple[ModelView, PreTrainedModel] | None, batch: Batch
) -> TeacherLogits | None:
    """The logits of a frozen model, which may be on another device than the batch."""
    if viewed is None:
        return None
    (view, model), device = viewed, batch.mask.device
    there = model.device
    # the host waits for the copies: the CPU would read one that is under way
    inputs = {name: each.to(there) for name, each in batch.inputs.items()}
    made = view(model, replace(batch, inputs=inputs))
    return made if made.hidden.device == device else MovedLogits(made, device)


class DrafterView:
    """The logits of a drafter and its target at masked anchors.

    Both cover the tokens that the drafter can propose. A batch's inputs are the sequences [B, T];
    its labels and mask are those of the anchors (`kdcore.data.anchors`): B * T rows of D positions.

    Args:
        target: The target model, which runs once per batch.
        drafter: The drafter, which reads the target's features.
        stored: The stored hidden states of the training rows, or None to compute them.

    Raises:
        UserError: The target has no linear head, or its logits differ from its head's: the drafter
            would learn from a different teacher.
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
                f"{type(target).__name__} does not have a linear head, which a drafter needs",
                "choose a causal language model whose head is a single matrix",
            )
        self.drafter, self.target, self.head, self.stored = drafter, target, head, stored
        self.tap = FeatureTap(target, (*drafter.layers, layer_count(target)))
        if target.device.type != "meta" and not body_and_head_agree(target, self.tap.decoder, head):
            raise UserError(
                f"the logits of {type(target).__name__} differ from the output of its head, with "
                "the scale and cap of its config",
                "choose another target: a drafter would learn from wrong logits",
            )

    def __call__(
        self, model: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, RepeatedLogits]:
        """Return the logits [N, V'] of drafter and target at the N masked positions.

        Args:
            model: The drafter, which may be wrapped (DDP).
            batch: The batch of anchors.

        Returns:
            The drafter's logits and the target's.
        """
        tokens = batch.inputs["input_ids"]
        features, final = self.read(batch)
        drafted = model(tokens, features)
        positions, depth = batch.positions_on_cpu, batch.mask.shape[1]
        # Level i of anchor r predicts the token at r + 1 + i, as the target does at r + i.
        reading = positions // depth + positions % depth + 1
        read, place = torch.unique(reading, return_inverse=True)
        predicting = final.flatten(0, 1)[sent(read, final.device)]
        vocabulary = self.drafter.vocabulary
        head = self.head() if vocabulary is None else self.head().rows(vocabulary)
        classes, _ = self.drafter.head.shape
        return (
            HiddenLogits(drafted.flatten(0, 2)[batch.positions], self.drafter.head, classes),
            RepeatedLogits(
                HiddenLogits(predicting, head, classes), sent(place, final.device), place
            ),
        )

    def reference(self, batch: Batch) -> None:
        """Return None: the training of a drafter has no reference model."""

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the drafter's features [B, T, F] and the target's last hidden states [B, T, H]."""
        tokens = batch.inputs["input_ids"]
        if self.stored is not None:
            stored = self.stored.read(batch.index.tolist(), tokens.shape[1])
            states = sent(stored, tokens.device)
        else:
            with self.tap.listening() as heard:
                self.target(**batch.inputs, use_cache=False, logits_to_keep=1)
            states = self.tap.join(heard, tokens)
        features = len(self.drafter.layers) * states.shape[-1] // len(self.tap.layers)
        return states[..., :features], states[..., features:]
