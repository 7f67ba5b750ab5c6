"""A method's loss for a training loop of one's own: the loss engine, called with plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.records import Batch
from kdcore.method.registry import installed
from kdcore.models.assembly import Assembly
from kdcore.specs.training import MethodSpec
from kdcore.training.method import build_objective

IGNORED = -100
"""The label of a position that is not learned, as transformers has it."""


class _NoModels(Assembly):
    """Builds and checks components as a run does, of those that need no other model."""

    def load_model(self, model: str) -> Any:
        raise UserError(
            f"a component asks for the model '{model}', and a bare loss loads none",
            "choose another component, or train by a spec",
        )


class DistillationLoss:
    """The loss of a spec's method section, without the spec.

    Args:
        chunk: positions whose loss is made at once.
        seed: of what the gates draw; each call draws anew.
        **method: the fields of a spec's ``method``: gates, divergence, splitters, terms, tau,
            normalize.

    Raises:
        UserError: for a weight of a term that the splitters do not give.
        pydantic.ValidationError: for a wrong field.
    """

    def __init__(self, *, chunk: int = 512, seed: int = 0, **method: Any) -> None:
        objective = build_objective(MethodSpec.model_validate(method), _NoModels(installed()))
        self.engine = LossEngine(objective, {"all": tuple(objective.weights)}, chunk)
        self.seed = seed
        self.last: StepLoss | None = None
        self._calls = 0

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        num_items: float | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """The loss of one micro-batch; its figures are then in ``last``.

        Args:
            student: [B, T, V] logits, with their graph.
            teacher: [B, T, V] logits.
            labels: [B, T] int64, unshifted; -100 where nothing is learned.
            num_items: what the whole step's loss is a mean over: rows with a label, or labels
                when ``normalize`` is 'token'. None counts this micro-batch.
            progress: share of the training done, in [0, 1].

        Returns:
            [] the loss, whose backward reaches the student's logits.

        Raises:
            ValueError: Logits of two shapes, as of models with padded vocabularies, or labels of
                another length; cut the logits to the tokens that both models know.
        """
        if student.shape != teacher.shape or student.shape[:2] != labels.shape:
            raise ValueError(
                f"student {list(student.shape)}, teacher {list(teacher.shape)} and labels "
                f"{list(labels.shape)} do not fit: give logits [B, T, V] of one shape, and labels "
                "[B, T]"
            )
        labels = labels[:, 1:]
        mask = labels != IGNORED
        batch = Batch({}, labels, mask, torch.arange(len(labels)))
        by_token = self.engine.objective.normalize == "token"
        counted = mask.sum() if by_token else mask.any(1).sum()
        generator = torch.Generator(labels.device).manual_seed(self.seed + self._calls)
        self._calls += 1
        classes = student.shape[-1]
        self.last = self.engine(
            HiddenLogits(student[:, :-1][mask], Head(), classes),
            HiddenLogits(teacher[:, :-1].detach()[mask], Head(), classes),
            batch,
            whole=float(max(1, int(counted))) if num_items is None else float(num_items),
            progress=progress,
            generator=generator,
        )
        return self.last.losses["all"]
