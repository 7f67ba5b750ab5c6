"""The models of a run, loaded together and held against one another and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcore.errors import UserError
from kdcore.models import (
    LoadedModel,
    in_order,
    load_model,
    load_student,
    model_kind,
    refuse_other_labels,
    shared_vocabulary,
)
from kdcore.objective import Objective
from kdcore.progress import Progress, Silent
from kdcore.protocols import DataSource
from kdcore.specs import DistillSpec


@dataclass(frozen=True, slots=True)
class TeacherAndStudent:
    """The models of a run.

    teacher: None where only the labels are learned. classes: V, how many classes both have.
    """

    teacher: LoadedModel | None
    student: LoadedModel
    classes: int

    @classmethod
    def load(
        cls,
        spec: DistillSpec,
        source: DataSource,
        *,
        weights: bool = True,
        progress: Progress | None = None,
    ) -> TeacherAndStudent:
        """Load both; a new student's weights are drawn from torch's global generator.

        weights: see `kdcore.models.load_model`.
        Raises UserError as that module does: also when the two, or the data's labels, do not fit.
        """
        kind = model_kind(source)
        with (progress or Silent()).stage("load models", 2) as stage:
            teacher = load_model(spec.teacher, kind=kind, weights=weights) if spec.teacher else None
            stage.advance()
            labels = getattr(source, "classes", None) or in_order(teacher.labels if teacher else {})
            student = load_student(spec.student, teacher, kind=kind, labels=labels, weights=weights)
            stage.advance()
        first = teacher or student
        classes = shared_vocabulary(first, student)
        refuse_other_labels(first, source)
        if first.model.can_generate():  # the student learns to end where the teacher ends
            theirs: Any = first.model.generation_config
            own: Any = student.model.generation_config
            own.eos_token_id, own.pad_token_id = theirs.eos_token_id, theirs.pad_token_id
        return cls(teacher, student, classes)

    @property
    def first(self) -> LoadedModel:
        """The teacher, or the student where there is none: its tokenizer makes the rows."""
        return self.teacher or self.student

    @property
    def named(self) -> dict[str, LoadedModel]:
        """Those there are, by what they are called."""
        both = {"teacher": self.teacher, "student": self.student}
        return {name: model for name, model in both.items() if model is not None}


def refuse_no_teacher(spec: DistillSpec, objective: Objective) -> None:
    """Raises UserError when a method learns from a teacher and the spec names none."""
    if spec.teacher is None and (wanting := objective.of_teacher):
        raise UserError(
            f"{wanting[0]} learns from a teacher, and the spec names none",
            "name a teacher; or learn from the labels alone, method: {terms: {task: 1, kd: 0}}",
        )
