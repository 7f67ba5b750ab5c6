"""A teacher whose weights follow the student's, as a moving average.

After each optimizer step, with w the teacher's weights and v the student's,

    w <- (1 - rate) w + rate v

The rate 1 makes the teacher the student itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from kdcore.errors import UserError
from kdcore.training.teachers.kinds import LiveTeacher, Teacher


@dataclass(frozen=True)
class FollowingTeacher(LiveTeacher):
    """A live teacher that follows the student.

    Attributes:
        rate: Share of the way to the student's weights.
    """

    rate: float = 1.0

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move the weights towards the student's."""
        ours = dict(student.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.lerp_(ours[name].to(weight.dtype), self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights of `state_dict`."""
        for name, weight in self.model.named_parameters():
            weight.copy_(state[name])


class Follow(TrainerCallback):
    """Lets a teacher follow the student after each optimizer step.

    Args:
        teacher: The teacher.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        self._teacher.follow(kwargs["model"])


def refuse_following(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """Check that a teacher can follow a student.

    Args:
        teacher: The teacher.
        student: The student.
        rate: Share of the way to the student's weights.

    Raises:
        UserError: Their weights differ in name or shape, or small changes would be rounded away.
    """
    sizes = [{n: p.shape for n, p in m.named_parameters()} for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(
            "method.teacher_follows moves the teacher's weights to the student's, and the two "
            "models have other weights",
            "set teacher.model to student.model, without layers and lora, or remove "
            "method.teacher_follows",
            "method.teacher_follows",
        )
    dtypes = {weight.dtype for weight in teacher.parameters()}
    if rate < 1 and dtypes != {torch.float32}:
        raise UserError(
            f"a teacher in {', '.join(sorted(str(each) for each in dtypes))} cannot follow the "
            "student in small steps, which it would round away",
            "set teacher.dtype: float32, or method.teacher_follows: 1",
            "method.teacher_follows",
        )
