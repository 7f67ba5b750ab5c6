"""Checks that a method fits the teacher and the student of a run."""

from __future__ import annotations

from kdcore.errors import UserError, in_field
from kdcore.method.objective import FEATURE, OF_LABELS, Objective
from kdcore.models.anatomy import head_of
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.specs.distill import DistillSpec


@in_field("method")
def refuse_no_teacher(
    spec: DistillSpec, objective: Objective, auxiliary: Objective | None = None
) -> None:
    """Check that a method that learns from a teacher has a teacher or a teacher cache.

    Args:
        spec: The spec of the run.
        objective: Its method.
        auxiliary: Its method on auxiliary rows, or None.

    Raises:
        UserError: The spec names neither, or none that reads auxiliary rows whose terms need it.
    """
    if auxiliary is not None:
        _refuse_no_teacher_of_others(spec, auxiliary)
    if spec.has_teacher:
        return
    if wanting := objective.of_teacher:
        raise UserError(
            f"{wanting[0]} requires a teacher, but the spec does not name one",
            "set teacher or data.teacher_cache, or train on the labels alone: method: {terms: "
            "{task: 1, kd: 0}}",
        )


def _refuse_no_teacher_of_others(spec: DistillSpec, auxiliary: Objective) -> None:
    """Raises UserError when the terms of auxiliary rows need a teacher that cannot read them."""
    reads_its_own = {
        "method.alignment": spec.method.alignment is not None,
        "data.teacher_prompt": spec.data.teacher_prompt is not None,
    }
    own = [name for name, is_so in reads_its_own.items() if is_so]
    if not auxiliary.of_teacher or (spec.has_live_teacher and not own):
        return
    why = (
        f"with {own[0]} the teacher reads rows of its own"
        if own
        else "no teacher runs on this machine, and a cache or a server has the training rows only"
    )
    raise UserError(
        f"data.auxiliary.terms: {auxiliary.of_teacher[-1]} needs the teacher's logits, but {why}",
        "keep the term 'task' only, or set teacher to a model on this machine",
        "data.auxiliary.terms",
    )


@in_field("method.terms")
def refuse_features(spec: DistillSpec, objective: Objective, models: TeacherAndStudent) -> None:
    """Check that teacher and student have hidden states of one width for the term ``feature``.

    Args:
        spec: The spec of the run.
        objective: Its method.
        models: Its models.

    Raises:
        UserError: The method weighs the term, and hidden states are missing or differ in width.
    """
    if FEATURE not in objective.weights:
        return
    if spec.teachers:
        raise UserError(
            "method.terms uses 'feature', but several teachers have no hidden states in common",
            "name a single teacher, or remove the term",
        )
    if spec.teacher is None and spec.data.teacher_cache is None:
        raise UserError(
            "method.terms uses 'feature', but there is no teacher to compare hidden states with",
            "set teacher, or remove the term",
        )
    if spec.served_teacher is not None:
        raise UserError(
            "method.terms uses 'feature', but a server does not return hidden states",
            "set teacher to a model without an endpoint, or remove the term",
        )
    if models.teacher is None or spec.data.teacher_cache is not None:
        raise UserError(
            "method.terms uses 'feature', but a teacher cache does not contain hidden states",
            "remove data.teacher_cache, or remove the term",
        )
    widths = []
    for loaded in (models.teacher, models.student):
        head = head_of(loaded.model)
        if head is None:
            raise UserError(
                f"method.terms uses 'feature', but {loaded.name} does not have a linear head whose "
                "hidden states can be compared",
                "remove the term",
            )
        _, width = head().shape
        widths.append(width)
    if len(set(widths)) > 1:
        raise UserError(
            "method.terms uses 'feature', but the hidden states of teacher and student have "
            f"different widths ({widths[0]} and {widths[1]})",
            "choose a student with the teacher's hidden width, or remove the term",
        )


@in_field("method.splitters")
def refuse_splitters(objective: Objective, models: TeacherAndStudent) -> None:
    """Check that the splitters have a meaning for models that give a row several labels.

    Each label is a position with two classes, absent and present.

    Args:
        objective: The method.
        models: The models.

    Raises:
        UserError: A splitter parts or masks classes.
    """
    if not models.student.multi_label:
        return
    for splitter in objective.splitters:
        if not getattr(splitter, "keeps_classes", False):
            raise UserError(
                f"the splitter {type(splitter).__name__} parts or masks the classes of a position, "
                "and each label of a multi-label classifier is a position with two classes",
                "remove the splitter; gates, divergences, tau and momenta work",
            )


@in_field("method.alignment")
def refuse_across_tokenizers(spec: DistillSpec, objective: Objective) -> None:
    """Check that a method works with a teacher of another tokenizer, where the spec has one.

    Args:
        spec: The spec of the run.
        objective: Its method.

    Raises:
        UserError: There is no teacher, or a component compares classes one by one.
    """
    if spec.method.alignment is None:
        return
    if spec.local_teacher is None:
        raise UserError(
            "method.alignment compares the tokens of two models, but the spec does not name a "
            "teacher on this machine",
            "set teacher, also where a teacher cache has its logits",
        )
    if objective.advantage is not None:
        raise UserError(
            "method.advantage reads the teacher's probability of each sampled token, and with "
            "method.alignment the teacher has other tokens",
            "remove method.advantage, or choose a teacher with the student's tokenizer",
        )
    for label, gate in objective.gates.items():
        reads = getattr(gate, "teacher_classes", None)
        if reads != 0 and not getattr(gate, "any_tokenizer", False):
            raise UserError(
                f"gate '{label}' compares the classes of teacher and student one by one, and with "
                "method.alignment they are different tokens",
                "choose a gate that reads one model alone, e.g. entropy, confidence or "
                "student_entropy",
            )
    joined = False
    for choice, splitter in zip(spec.method.splitters, objective.splitters, strict=True):
        if getattr(splitter, "joins_tokenizers", False):
            if joined:
                raise UserError(
                    f"splitter '{choice.name}' reads the classes of both tokenizers, which an "
                    "earlier splitter has replaced",
                    f"remove '{choice.name}', or the splitter before it",
                )
            joined = True
        elif not getattr(splitter, "any_tokenizer", False):
            raise UserError(
                f"splitter '{choice.name}' needs classes that mean the same in both models, and "
                "with method.alignment they are different tokens",
                f"remove '{choice.name}', or method.alignment",
            )
    if not joined and any(name not in {*OF_LABELS, FEATURE} for name in objective.weights):
        raise UserError(
            "method.alignment leaves the models with different classes, and no splitter makes them "
            "comparable",
            "add a splitter that does, e.g. splitters: [uld], or set the weight of kd to 0",
        )
