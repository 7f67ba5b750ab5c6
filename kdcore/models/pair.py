"""The teacher and student of a run, with checks that they fit each other and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from kdcore.errors import UserError
from kdcore.method.objective import FEATURE, Objective
from kdcore.method.protocols import DataSource
from kdcore.models.anatomy import head_of
from kdcore.models.folder.quantization import refuse_untrainable
from kdcore.models.loaded import LoadedModel, first_few, in_order
from kdcore.models.loading import load_model, load_student, set_padding
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.distill import DistillSpec
from kdcore.specs.fields import ModelSpec

_ONE_LIST = (
    "give it the class list of the training rows (labelled_text: classes_from), so that a class "
    "means the same label in both"
)


@dataclass(frozen=True, slots=True)
class TeacherAndStudent:
    """The models of a run.

    Attributes:
        teacher: The teacher; None for a run without a live teacher.
        student: The student.
        classes: Number V of classes that all models share.
        reference: The third model, which a gate names.
    """

    teacher: LoadedModel | None
    student: LoadedModel
    classes: int
    reference: LoadedModel | None = None

    @classmethod
    def load(
        cls,
        spec: DistillSpec,
        sources: Mapping[str, DataSource],
        *,
        reference: str | None = None,
        weights: bool = True,
        progress: Progress | None = None,
    ) -> TeacherAndStudent:
        """Load the models; the weights of a new student come from torch's global generator.

        Args:
            spec: The spec of the run.
            sources: Data sources by the names of their fields; ``train`` determines the kind of
                model and its labels.
            reference: See `kdcore.method.objective.Objective`.
            weights: See `kdcore.models.loading.load_model`.
            progress: Receiver of the progress.

        Returns:
            The models of the run.

        Raises:
            UserError: A model cannot be loaded, or the models and the labels of the data do not
                fit together.
        """
        refuse_untrainable(spec.student, spec.teacher)
        source = sources["train"]
        kind = model_kind(source)
        with (progress or Silent()).stage("load models", 3 if reference else 2) as stage:
            teacher = load_model(spec.teacher, kind=kind, weights=weights) if spec.teacher else None
            stage.advance()
            third = None
            if reference:
                named = ModelSpec.model_validate({"model": reference})
                third = load_model(named, kind=kind, weights=weights)
                stage.advance()
            labels = getattr(source, "classes", None) or in_order(teacher.labels if teacher else {})
            widths = [model.classes for model in (teacher, third) if model is not None]
            student = load_student(
                spec.student,
                teacher,
                kind=kind,
                labels=labels,
                classes=min(widths, default=None),
                weights=weights,
            )
            stage.advance()
        first = teacher or student
        others = [student] if third is None else [student, third]
        classes = min(shared_vocabulary(first, other) for other in others)
        if third is not None and weights:
            set_padding(third.model, first.tokenizer)
        refuse_other_labels(first, source)
        for name in sources.keys() - {"train"}:
            refuse_other_labels(first, sources[name], f"data.{name}", _ONE_LIST)
        if spec.data.on_policy is not None and not first.model.can_generate():
            raise UserError(
                f"data.on_policy requires a model that generates text, and {first.name} does not",
                "use a language model, or remove data.on_policy",
            )
        if first.model.can_generate():  # the student learns the teacher's end tokens
            theirs: Any = first.model.generation_config
            own: Any = student.model.generation_config
            own.eos_token_id, own.pad_token_id = theirs.eos_token_id, theirs.pad_token_id
        if spec.teacher and (spec.teacher.template or spec.teacher.template_arguments):
            student.tokenizer.chat_template = first.tokenizer.chat_template
        return cls(teacher, student, classes, third)

    @property
    def first(self) -> LoadedModel:
        """The model whose tokenizer encodes the rows: the teacher or, without one, the student."""
        return self.teacher or self.student

    @property
    def named(self) -> dict[str, LoadedModel]:
        """The loaded models by their roles."""
        three = {"teacher": self.teacher, "student": self.student, "reference": self.reference}
        return {name: model for name, model in three.items() if model is not None}


def refuse_no_teacher(spec: DistillSpec, objective: Objective) -> None:
    """Check that a method that learns from a teacher has a teacher or a teacher cache.

    Args:
        spec: The spec of the run.
        objective: Its method.

    Raises:
        UserError: The spec names neither.
    """
    if spec.teacher or spec.data.teacher_cache:
        return
    if wanting := objective.of_teacher:
        raise UserError(
            f"{wanting[0]} requires a teacher, but the spec does not name one",
            "set teacher or data.teacher_cache, or train on the labels alone: method: {terms: "
            "{task: 1, kd: 0}}",
        )


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
    if models.teacher is None and spec.data.teacher_cache is None:
        raise UserError(
            "method.terms uses 'feature', but there is no teacher to compare hidden states with",
            "set teacher, or remove the term",
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


def model_kind(source: DataSource) -> Any:
    """The transformers class that a source's rows require (default: AutoModelForCausalLM)."""
    return getattr(transformers, getattr(source, "model_class", "AutoModelForCausalLM"))


def refuse_other_labels(
    model: LoadedModel, source: DataSource, name: str = "the data", cure: str | None = None
) -> None:
    """Check that a classifier has the labels of a source, in the same order.

    Args:
        model: The model.
        source: The data source.
        name: Name of the source in the message.
        cure: Cure in the message (default: use another teacher).

    Raises:
        UserError: The labels or their order differ.
    """
    classes = getattr(source, "classes", None)
    labels = in_order(model.labels)
    if classes is not None and labels != list(classes):
        raise UserError(
            f"{model.name} has the labels {first_few(labels)}, but {name} has {first_few(classes)}",
            cure
            or "use a teacher trained on these labels; its config.id2label must list them in the "
            "order of the data, which is alphabetical",
        )


def shared_vocabulary(teacher: LoadedModel, student: LoadedModel) -> int:
    """The number of classes that the logits of two models share; further classes are padding.

    Args:
        teacher: One model.
        student: The other model.

    Returns:
        The number V of leading classes in both logits.

    Raises:
        UserError: The tokenizers give a token different ids, the logits of a model lack ids of
            its tokenizer, or two classifiers have different labels.
    """
    ids, other = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    different = sorted(
        (token for token in ids.keys() | other.keys() if ids.get(token) != other.get(token)),
        key=lambda token: (ids.get(token, len(ids)), token),
    )
    if different:
        shown = [f"{token!r} is {ids.get(token)} and {other.get(token)}" for token in different[:3]]
        raise UserError(
            f"the tokenizers of {teacher.name} and {student.name} differ in {len(different)} "
            f"tokens, e.g. {', '.join(shown)}",
            "choose a student of the teacher's family, or cut the student from the teacher",
        )
    if teacher.labels != student.labels:
        raise UserError(
            f"{teacher.name} ({len(teacher.labels)} labels) and {student.name} "
            f"({len(student.labels)} labels) do not have the same labels",
            "choose a student with the teacher's labels, or a student without a head",
        )
    if teacher.labels:
        return teacher.classes
    for model in (teacher, student):
        if model.classes <= max(ids.values()):
            raise UserError(
                f"{model.name} has logits for {model.classes} tokens, but its tokenizer has ids up "
                f"to {max(ids.values())}",
                "use a model whose head covers its tokenizer",
            )
    return min(teacher.classes, student.classes)
