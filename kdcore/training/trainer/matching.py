"""Matchers of hidden states in a training: bound to the models, trained as a part of the student.

While a student is trained, its matchers are a submodule of it. So the optimizer, clipping, the
processes of DDP and the momentum policy treat their weights like the student's. Checkpoints store
them beside the other state of the objective, and the saved student has none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import UserError, in_field
from kdcore.method.objective import Objective
from kdcore.method.protocols import Matcher
from kdcore.method.records import StateSizes
from kdcore.models.facts import describe_model
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.specs.distill import DistillSpec

_SUBMODULE = "kdcore_matchers"


@in_field("method.matchers")
def bind_matchers(spec: DistillSpec, objective: Objective, models: TeacherAndStudent) -> None:
    """Bind the matchers of a method to the models.

    Args:
        spec: The spec of the run.
        objective: Its method.
        models: Its models, which need no weights.

    Raises:
        UserError: There is no live teacher, or no language model, or a matcher does not fit.
    """
    for label, matcher in objective.matchers.items():
        if models.teacher is None or spec.data.teacher_cache is not None:
            raise UserError(
                f"matcher '{label}' compares hidden states, which need a live teacher"
                + (": a teacher cache does not contain them" if spec.data.teacher_cache else ""),
                "set teacher, and remove data.teacher_cache if it is set; or remove the matcher",
            )
        for loaded in (models.teacher, models.student):
            if not loaded.model.can_generate():
                raise UserError(
                    f"matcher '{label}' compares the hidden states of language models, and "
                    f"{loaded.name} is a classifier",
                    "remove the matcher",
                )
        facts = describe_model(models.student), describe_model(models.teacher)
        matcher.bind(*(StateSizes(each.layers, each.hidden) for each in facts))


def matched_states(objective: Objective) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the hidden states that an objective's bound matchers read.

    Args:
        objective: The objective.

    Returns:
        Those of the student and those of the teacher, each in increasing order.
    """
    pairs = [pair for matcher in objective.matchers.values() for pair in matcher.pairs]
    ours, theirs = ({pair[side] for pair in pairs} for side in (0, 1))
    return tuple(sorted(ours)), tuple(sorted(theirs))


@contextmanager
def attached(student: Any, matchers: Mapping[str, Matcher], device: torch.device) -> Iterator[None]:
    """Make matchers a submodule of the student inside the context.

    Args:
        student: The student.
        matchers: Label -> matcher, a torch.nn.Module.
        device: The device of the training.
    """
    if not matchers:
        yield
        return
    modules: Any = dict(matchers)
    student.add_module(_SUBMODULE, nn.ModuleDict(modules).to(device))
    try:
        yield
    finally:
        delattr(student, _SUBMODULE)


def without_matchers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a student without those of its attached matchers."""
    return {name: tensor for name, tensor in state.items() if _SUBMODULE not in name.split(".")}
