"""Matchers in a training: bound to the models, and trained as a part of the student.

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
from kdcore.models.anatomy import layers_of
from kdcore.models.facts import describe_model
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.matching.attention import refuse_unwatched
from kdcore.models.matching.layers import reads_attention, reads_values
from kdcore.training.model_view import Matched

_SUBMODULE = "kdcore_matchers"


@in_field("method.matchers")
def bind_matchers(objective: Objective, models: TeacherAndStudent) -> None:
    """Bind the matchers of a method to the models.

    Args:
        objective: The method.
        models: The models, which need no weights.

    Raises:
        UserError: A model has nothing that a matcher reads, or a matcher does not fit.
    """
    for label, matcher in objective.matchers.items():
        assert models.teacher is not None  # Method.build refuses a spec without a live one
        each = {"teacher": models.teacher, "student": models.student}
        for role, loaded in each.items():
            if reads_attention(matcher):
                refuse_unwatched(loaded.model, role)
            else:
                _refuse_stages(label, loaded)
        matcher.bind(sizes_of(models.student), sizes_of(models.teacher))
        if reads_attention(matcher):
            ours, theirs = (set(numbers) for numbers in zip(*matcher.pairs, strict=True))
            refuse_unwatched(models.teacher.model, "teacher", theirs)
            refuse_unwatched(models.student.model, "student", ours)


def _refuse_stages(label: str, loaded: LoadedModel) -> None:
    """Raises UserError for a model whose hidden states have no common width, or no list."""
    if getattr(loaded.model.config, "depths", None) is not None:
        raise UserError(
            f"matcher '{label}' compares hidden states of one width, and {loaded.name} has stages "
            "of several widths",
            "choose models such as ViT or BERT, or remove the matcher",
        )
    layers_of(loaded.model)


def sizes_of(loaded: LoadedModel) -> StateSizes:
    """The sizes of a model that matchers are bound to."""
    facts, config = describe_model(loaded), loaded.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0
    shared = getattr(config, "num_key_value_heads", None)
    return StateSizes(facts.layers, facts.hidden, heads, shared if shared and heads else heads)


def matched_by(objective: Objective) -> tuple[Matched, Matched]:
    """What an objective's bound matchers read of the student, and of the teacher."""
    values = any(map(reads_values, objective.matchers.values()))
    student, teacher = (
        Matched(_read(objective, side, False), _read(objective, side, True), values)
        for side in (0, 1)
    )
    return student, teacher


def _read(objective: Objective, side: int, attention: bool) -> tuple[int, ...]:
    """The numbers that matchers of hidden states or of attention read of one of the models."""
    matchers = (m for m in objective.matchers.values() if reads_attention(m) == attention)
    return tuple(sorted({pair[side] for matcher in matchers for pair in matcher.pairs}))


def matched_lines(objective: Objective) -> Iterator[str]:
    """Yield what each bound matcher compares, for a report."""
    for label, matcher in objective.matchers.items():
        what = "hidden states"
        if reads_attention(matcher):
            what = f"{'values' if reads_values(matcher) else 'attention'} of layers"
        pairs = ", ".join(f"{ours} with {theirs}" for ours, theirs in matcher.pairs)
        yield f"matcher {label}: {what} {pairs} (student with teacher)"


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
