"""Views: the logits at masked positions, of a model or of a drafter and its target.

This is the only place where the code for students and drafters differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.caches.hidden_states import HiddenStates
from kdcore.decoding.protocols import TrainedDrafter
from kdcore.errors import UserError
from kdcore.method.logits import HiddenLogits, RepeatedLogits, TeacherLogits
from kdcore.method.records import Batch, of_shape
from kdcore.models.anatomy import head_of, layer_count
from kdcore.models.device import sent
from kdcore.models.features import FeatureTap
from kdcore.models.probes import body_and_head_agree
from kdcore.training.model_view import Matched, ModelView, frozen_logits
from kdcore.training.teachers.kinds import NoTeacher, Teacher


class View(Protocol):
    """The logits that the Trainer needs: those of the trained model and of its teacher."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch, progress: float
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """Return the logits [N, V] of both models at the N masked positions.

        Args:
            model: The trained model, which may be wrapped (DDP).
            batch: The batch of training rows.
            progress: Share of the training done, in [0, 1].

        Returns:
            The trained model's logits and the teacher's.
        """

    def reference(self, batch: Batch) -> TeacherLogits | None:
        """Return the logits of the reference model that gates name; None without one."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the teacher that training changes, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`."""


class StudentView:
    """The logits of a student and of what teaches it.

    Args:
        student: The model that is trained.
        classes: V, the number of the student's classes that are compared.
        taught_by: The teacher of whatever kind (default: none).
        reference: The reference model that gates name, or None.
        matched: What of the student matchers read.
    """

    def __init__(
        self,
        student: nn.Module,
        classes: int,
        taught_by: Teacher | None = None,
        *,
        reference: PreTrainedModel | None = None,
        matched: Matched | None = None,
    ) -> None:
        self.student = ModelView(student, classes, matched)
        self.taught_by = taught_by or NoTeacher()
        self._reference = None if reference is None else (ModelView(reference, classes), reference)

    def __call__(
        self, model: Callable[..., Any], batch: Batch, progress: float
    ) -> tuple[HiddenLogits, TeacherLogits]:
        """Return the student's and the teacher's logits for a batch of training rows."""
        return self.student(model, batch), self.taught_by.logits(batch, progress)

    def beside(self, taught_by: Teacher) -> StudentView:
        """Return the view of the same student and reference with another teacher."""
        other = copy(self)
        other.taught_by = taught_by
        return other

    def teacher(self, batch: Batch) -> TeacherLogits | None:
        """Return the teacher's logits for any rows; None for a teacher that lacks them."""
        return self.taught_by.of_any(batch)

    def reference(self, batch: Batch) -> TeacherLogits | None:
        """Return the reference model's logits; None without a reference model."""
        return None if self._reference is None else frozen_logits(*self._reference, batch)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the teacher that training changes."""
        return self.taught_by.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`."""
        self.taught_by.load_state_dict(state)


class DrafterView:
    """The logits of a drafter and its target at masked anchors.

    Both cover the tokens that the drafter can propose. A batch's inputs are the sequences [B, T];
    its labels and mask are those of the anchors
    (`kdcore.data.batching.anchors`): B * T rows of D positions.

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
                "target",
            )

    def __call__(
        self, model: Callable[..., Any], batch: Batch, progress: float = 0.0
    ) -> tuple[HiddenLogits, RepeatedLogits]:
        """Return the logits [N, V'] of drafter and target at the N masked positions.

        Args:
            model: The drafter, which may be wrapped (DDP).
            batch: The batch of anchors.
            progress: Share of the training done, on which the target does not depend.

        Returns:
            The drafter's logits and the target's.

        Raises:
            UserError: The drafter does not return hidden states [B, T, D, H].
        """
        tokens = batch.inputs["input_ids"]
        features, final = self.read(batch)
        positions, depth = batch.positions_on_cpu, batch.mask.shape[1]
        classes, width = self.drafter.head.shape
        drafted = of_shape(
            model(tokens, features),
            (*tokens.shape, depth, width),
            f"the drafter {type(self.drafter).__name__}",
            "hidden states",
        )
        # Level i of anchor r predicts the token at r + 1 + i, as the target does at r + i.
        reading = positions // depth + positions % depth + 1
        read, place = torch.unique(reading, return_inverse=True)
        predicting = final.flatten(0, 1)[sent(read, final.device)]
        vocabulary = self.drafter.vocabulary
        head = self.head() if vocabulary is None else self.head().rows(vocabulary)
        return (
            HiddenLogits(drafted.flatten(0, 2)[batch.positions], self.drafter.head, classes),
            RepeatedLogits(
                HiddenLogits(predicting, head, classes), sent(place, final.device), place
            ),
        )

    def reference(self, batch: Batch) -> None:
        """Return None: the training of a drafter has no reference model."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: training does not change the target."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore nothing."""

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
