"""The teacher and student of a run, with checks that they fit each other and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from kdcore.errors import UserError, in_field
from kdcore.models.folder.quantization import refuse_quantized_training
from kdcore.models.loading.load import load_model, load_student, set_padding
from kdcore.models.loading.loaded import LoadedModel, first_few, in_order
from kdcore.models.loading.mapped import mapped_student
from kdcore.models.probes import flattens_packed_rows
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.parts.on_policy import sampled_with_teacher

_ONE_VOCABULARY = (
    "choose a student of the teacher's family, cut the student from the teacher, or set "
    "method.alignment to compare the two across their tokenizers"
)
_NO_ALIGNMENT = (
    "choose teachers and a student of one family: several teachers need one tokenizer (a method "
    "with method.alignment takes a single teacher)"
)
_ONE_REFERENCE = "let the gate name a reference model of the teacher's family"
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
        classes: Number V of classes that all models share; with ``aligned`` that of the student.
        reference: The third model, which a gate names.
        aligned: Whether teacher and student read their own tokens of the same text
            (``method.alignment``).
        several: Name -> teacher, those of several teachers that run on this machine.
    """

    teacher: LoadedModel | None
    student: LoadedModel
    classes: int
    reference: LoadedModel | None = None
    aligned: bool = False
    several: Mapping[str, LoadedModel] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        spec: DistillSpec,
        sources: Mapping[str, object],
        *,
        reference: str | None = None,
        weights: bool = True,
        device: torch.device | None = None,
        student_file: Path | None = None,
        progress: Progress | None = None,
    ) -> TeacherAndStudent:
        """Load the models; the weights of a new student come from torch's global generator.

        Args:
            spec: The spec of the run.
            sources: Data sources by the names of their fields; ``train`` determines the kind of
                model and its labels.
            reference: See `kdcore.method.objective.Objective`.
            weights: See `kdcore.models.loading.load.load_model`.
            device: See `kdcore.models.loading.load.load_model`.
            student_file: File from which several processes map the student, which stays on the CPU;
                see `kdcore.models.loading.mapped`. None: each process loads it.
            progress: Receiver of the progress.

        Returns:
            The models of the run.

        Raises:
            UserError: A model cannot be loaded, or the models and the labels of the data do not
                fit together.
        """
        sharded = student_file is not None
        with in_field("student"):
            refuse_quantized_training(spec.student, spec.local_teacher, sharded=sharded)
        source, aligned = sources["train"], spec.method.alignment is not None
        kind = model_kind(source)
        number = (3 if reference else 2) + len(spec.local_teachers)
        with (progress or Silent()).stage("load models", number) as stage:
            local = spec.local_teacher
            arguments: Any = {"kind": kind, "weights": weights, "device": device}
            with in_field("teacher"):
                teacher = load_model(local, **arguments) if local else None
            stage.advance()
            several = {}
            for name, asked in spec.local_teachers.items():
                with in_field(f"teachers.{name}"):
                    several[name] = load_model(asked, **arguments)
                stage.advance()
            third = None
            if reference:
                named = ModelSpec.model_validate({"model": reference})
                with in_field("method.gates"):
                    third = load_model(named, **arguments)
                stage.advance()
            known = [model for model in (teacher, *several.values(), third) if model is not None]
            own_labels = known[0].labels if known and known[0] is not third else {}
            labels = getattr(source, "classes", None) or in_order(own_labels)
            widths = [model.classes for model in known]
            its: dict[str, Any] = {
                "kind": kind,
                "labels": labels,
                "multi_label": getattr(source, "multi_label", False),
                "classes": None if aligned else min(widths, default=None),
            }
            with in_field("student"):
                if student_file is None:
                    student = load_student(spec.student, teacher, **(its | arguments))
                else:
                    student = mapped_student(
                        student_file,
                        lambda: load_student(spec.student, teacher, **its),
                        lambda: _outlined(spec, teacher, its),
                    )
                set_padding(student.model, (teacher or student).tokenizer)  # outlines have none
            stage.advance()
        if aligned and teacher is not None:
            _refuse_alignment(spec, teacher, student)
            return cls(teacher, student, student.classes, aligned=True)
        first = teacher or student
        _refuse_other_kind(first, source)
        others = {"student": student} | ({} if third is None else {"method.gates": third})
        others |= {f"teachers.{name}": model for name, model in several.items()}
        cure = _NO_ALIGNMENT if spec.teachers else _ONE_VOCABULARY
        classes = first.classes
        for place, other in others.items():
            mended = _ONE_REFERENCE if other is third else cure
            with in_field(place):
                classes = min(classes, shared_vocabulary(first, other, mended))
        for other in several.values() if weights else ():
            set_padding(other.model, first.tokenizer)
        if third is not None and weights:
            set_padding(third.model, first.tokenizer)
        refuse_other_labels(first, source)
        for name in sources.keys() - {"train"}:
            refuse_other_labels(first, sources[name], f"data.{name}", _ONE_LIST)
        if spec.data.on_policy is not None and not first.model.can_generate():
            raise UserError(
                f"data.on_policy requires a model that generates text, and {first.name} does not",
                "use a language model, or remove data.on_policy",
                "data.on_policy",
            )
        if first.model.can_generate():  # the student learns the teacher's end tokens
            theirs: Any = first.model.generation_config
            own: Any = student.model.generation_config
            own.eos_token_id, own.pad_token_id = theirs.eos_token_id, theirs.pad_token_id
        if local and (local.template or local.template_arguments):
            student.tokenizer.chat_template = first.tokenizer.chat_template
        return cls(teacher, student, classes, third, several=several)

    @property
    def first(self) -> LoadedModel:
        """The model whose tokenizer encodes the student's rows.

        The teacher, or the student if there is no teacher or it reads its own tokens.
        """
        return self.student if self.aligned else self.answerer

    @property
    def answerer(self) -> LoadedModel:
        """The model that answers prompts and that a teacher cache stores, with its own tokens.

        The teacher or, without one, the student.
        """
        return self.teacher or self.student

    @property
    def answered_classes(self) -> int:
        """The number of classes of `answerer` that are compared."""
        return self.answerer.classes if self.aligned else self.classes

    @property
    def named(self) -> dict[str, LoadedModel]:
        """The loaded models by their roles, several teachers last."""
        three = {"teacher": self.teacher, "student": self.student, "reference": self.reference}
        loaded = {name: model for name, model in three.items() if model is not None}
        return loaded | {f"teacher {name}": model for name, model in self.several.items()}

    @property
    def flattens_packed_rows(self) -> bool:
        """Whether some model keeps packed rows apart only in one single sequence."""
        return any(flattens_packed_rows(each.model) for each in self.named.values())


def _outlined(
    spec: DistillSpec, teacher: LoadedModel | None, arguments: dict[str, Any]
) -> LoadedModel:
    """The student on the meta device; ``arguments``: further ones of `load_student`."""
    if spec.student.model == "teacher" and spec.local_teacher is not None:
        teacher = load_model(spec.local_teacher, kind=arguments["kind"], weights=False)
    return load_student(spec.student, teacher, weights=False, **arguments)


def model_kind(source: object) -> Any:
    """The transformers class that a source's rows require (default: AutoModelForCausalLM)."""
    return getattr(transformers, getattr(source, "model_class", "AutoModelForCausalLM"))


def refuse_other_labels(
    model: LoadedModel, source: object, name: str = "the data", cure: str | None = None
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
    _refuse_other_kind(model, source, name)
    if classes is not None and labels != list(classes):
        raise UserError(
            f"{model.name} has the labels {first_few(labels)}, but {name} has {first_few(classes)}",
            cure
            or "use a teacher trained on these labels; its config.id2label must list them in the "
            "order of the data, which is alphabetical",
        )


def _refuse_other_kind(model: LoadedModel, source: object, name: str = "the data") -> None:
    """Raises UserError when one of model and source has a label in a row, and the other several."""
    several = getattr(source, "multi_label", False)
    if hasattr(source, "classes") and several != model.multi_label:
        kinds = {True: "any number of labels", False: "one label"}
        raise UserError(
            f"{model.name} gives a row {kinds[model.multi_label]}, but a row of {name} has "
            f"{kinds[several]}",
            "use a model whose config has problem_type: multi_label_classification, or data with "
            "one label in a row"
            if several
            else "set separator of labelled_text, name a column of lists, or use a model whose "
            "config has problem_type: single_label_classification",
        )


@in_field("method.alignment")
def _refuse_alignment(spec: DistillSpec, teacher: LoadedModel, student: LoadedModel) -> None:
    """Raises UserError for what a teacher with another tokenizer cannot do."""
    for model in (teacher, student):
        if not model.model.can_generate():
            raise UserError(
                f"method.alignment aligns the tokens of texts, and {model.name} is not a language "
                "model",
                "remove method.alignment",
            )
    for policy in sampled_with_teacher(spec.data.on_policy):
        raise UserError(
            f"method.alignment and {policy} cannot be combined: both models take part in the "
            "choice of a token, and their tokens differ",
            "set data.on_policy.policy: student",
        )


def shared_vocabulary(
    teacher: LoadedModel,
    student: LoadedModel,
    cure: str = "choose a student of the teacher's family, or cut the student from the teacher",
) -> int:
    """The number of classes that the logits of two models share; further classes are padding.

    Args:
        teacher: One model.
        student: The other model.
        cure: Cure in the message about different tokenizers.

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
            cure,
        )
    if teacher.multi_label != student.multi_label:
        raise UserError(
            f"of {teacher.name} and {student.name} one gives a row any number of labels, and the "
            "other one label",
            "choose models with the same problem_type in their configs",
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
                f"use the tokenizer that belongs to {model.name}, or another model",
            )
    return min(teacher.classes, student.classes)
