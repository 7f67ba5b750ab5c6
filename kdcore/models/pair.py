"""The models of a run, loaded together and held against one another and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from kdcore.errors import UserError
from kdcore.method.objective import FEATURE, Objective
from kdcore.method.protocols import DataSource
from kdcore.models.anatomy import head_of
from kdcore.models.loaded import LoadedModel, first_few, in_order
from kdcore.models.loading import load_model, load_student
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.distill import DistillSpec
from kdcore.specs.fields import ModelSpec

_ONE_LIST = (
    "let it take its classes from where the training rows do (labelled_text: classes_from), or "
    "a class would be another there"
)


@dataclass(frozen=True, slots=True)
class TeacherAndStudent:
    """The models of a run.

    teacher: None where only the labels are learned. classes: V, how many classes all have.
    reference: the third model, which a gate asks for.
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
        """Load them; a new student's weights are drawn from torch's global generator.

        sources: by their fields; train says which kind of model, and with which labels.
        reference: see `kdcore.method.objective.Objective`; weights: see
        `kdcore.models.loading.load_model`.
        Raises UserError as that module does: also when they, or the data's labels, do not fit.
        """
        source = sources["train"]
        kind = model_kind(source)
        with (progress or Silent()).stage("load models", 3 if reference else 2) as stage:
            teacher = load_model(spec.teacher, kind=kind, weights=weights) if spec.teacher else None
            stage.advance()
            labels = getattr(source, "classes", None) or in_order(teacher.labels if teacher else {})
            student = load_student(spec.student, teacher, kind=kind, labels=labels, weights=weights)
            stage.advance()
            third = None
            if reference:
                named = ModelSpec.model_validate({"model": reference})
                third = load_model(named, kind=kind, weights=weights)
                stage.advance()
        first = teacher or student
        others = [student] if third is None else [student, third]
        classes = min(shared_vocabulary(first, other) for other in others)
        refuse_other_labels(first, source)
        for name in sources.keys() - {"train"}:
            refuse_other_labels(first, sources[name], f"data.{name}", _ONE_LIST)
        if spec.data.on_policy is not None and not first.model.can_generate():
            raise UserError(
                f"data.on_policy lets the student write responses, and {first.name} writes none",
                "use a language model, or remove data.on_policy",
            )
        if first.model.can_generate():  # the student learns to end where the teacher ends
            theirs: Any = first.model.generation_config
            own: Any = student.model.generation_config
            own.eos_token_id, own.pad_token_id = theirs.eos_token_id, theirs.pad_token_id
        return cls(teacher, student, classes, third)

    @property
    def first(self) -> LoadedModel:
        """The teacher, or the student where there is none: its tokenizer makes the rows."""
        return self.teacher or self.student

    @property
    def named(self) -> dict[str, LoadedModel]:
        """Those there are, by what they are called."""
        three = {"teacher": self.teacher, "student": self.student, "reference": self.reference}
        return {name: model for name, model in three.items() if model is not None}


def refuse_no_teacher(spec: DistillSpec, objective: Objective) -> None:
    """Raises UserError when a method learns from a teacher and the spec names none.

    A cache is one, for all that training asks.
    """
    if spec.teacher or spec.data.teacher_cache:
        return
    if wanting := objective.of_teacher:
        raise UserError(
            f"{wanting[0]} learns from a teacher, and the spec names none",
            "name a teacher, or a data.teacher_cache; or learn from the labels alone, method: "
            "{terms: {task: 1, kd: 0}}",
        )


def refuse_features(spec: DistillSpec, objective: Objective, models: TeacherAndStudent) -> None:
    """Raises UserError when a term compares hidden states that are not there, or of two widths."""
    if FEATURE not in objective.weights:
        return
    if models.teacher is None or spec.data.teacher_cache is not None:
        raise UserError(
            "method.terms weighs 'feature', and a teacher cache holds no hidden states",
            "leave data.teacher_cache out, or remove the term",
        )
    widths = []
    for loaded in (models.teacher, models.student):
        head = head_of(loaded.model)
        if head is None:
            raise UserError(
                f"method.terms weighs 'feature', and {loaded.name} has no linear head whose hidden "
                "states could be compared",
                "remove the term",
            )
        _, width = head().shape
        widths.append(width)
    if len(set(widths)) > 1:
        raise UserError(
            "method.terms weighs 'feature', and the hidden states of teacher and student are "
            f"{widths[0]} and {widths[1]} wide",
            "choose a student of the teacher's width, or remove the term",
        )


def model_kind(source: DataSource) -> Any:
    """The transformers class that a source's rows are for; a causal language model's if silent."""
    return getattr(transformers, getattr(source, "model_class", "AutoModelForCausalLM"))


def refuse_other_labels(
    model: LoadedModel, source: DataSource, name: str = "the data", cure: str | None = None
) -> None:
    """Raises UserError when a classifier's labels are not the source's, in the source's order.

    name: what messages call the source. cure: by default to choose another model.
    """
    classes = getattr(source, "classes", None)
    labels = in_order(model.labels)
    if classes is not None and labels != list(classes):
        raise UserError(
            f"{model.name} has the labels {first_few(labels)} and {name} {first_few(classes)}",
            cure
            or "name a teacher trained on these labels; its config.id2label must list them in the "
            "data's order, which is alphabetical",
        )


def shared_vocabulary(teacher: LoadedModel, student: LoadedModel) -> int:
    """The number of leading classes that both models' logits have; beyond it lies padding.

    Raises UserError when their tokenizers give different ids to a token, when a model's logits
    lack ids that the tokenizer gives, or when two classifiers differ in their labels.
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
            "choose a student of the teacher's own family, or cut it from the teacher",
        )
    if teacher.labels != student.labels:
        raise UserError(
            f"{teacher.name} has {len(teacher.labels)} labels and {student.name} has "
            f"{len(student.labels)}, or they are named differently",
            "choose a student with the teacher's labels, or one without a head",
        )
    if teacher.labels:
        return teacher.classes
    for model in (teacher, student):
        if model.classes <= max(ids.values()):
            raise UserError(
                f"{model.name} has logits for {model.classes} tokens, its tokenizer gives ids "
                f"up to {max(ids.values())}",
                "name a model whose head fits its tokenizer",
            )
    return min(teacher.classes, student.classes)
