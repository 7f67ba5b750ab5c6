"""A run as data: what a spec file may say, with its types, defaults and JSON schema.

Every model is frozen and refuses unknown keys. Relative input paths are taken from the spec's own
folder; the run folder from the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kdcore.specs.fields import DEFAULTS, InputPath, ModelName, ModelSpec, Seed, SpecModel
from kdcore.specs.training import (
    Before,
    EvaluationSpec,
    KeptResponsesSpec,
    MethodSpec,
    RowsSpec,
    TrainingSpec,
    refuse_nothing_to_measure,
)


class LoraSpec(SpecModel):
    """Train low-rank adapters (peft) instead of all weights."""

    r: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveFloat = Field(32.0, description="scale of the adapters")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="modules that get an adapter"
    )


class StudentSpec(ModelSpec):
    """The student: a model of its own, or a cut of the teacher."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the weights in memory; float16 cannot be trained"
    )
    model: ModelName = Field(
        "teacher",
        description="'teacher' for a cut of the teacher, 'new' for one made from config, else as "
        "for the teacher",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="of a new model: {model_type: ..., its fields}, as transformers names them; "
        "labels come from the data",
    )
    tokenizer: ModelName | None = Field(
        None, description="of a new model: named as a model; by default the teacher's"
    )
    layers: list[int] | None = Field(
        None, description="keep these layers only, e.g. [0, 1, 4, 7]; negative counts from the end"
    )
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _a_copy_learns_nothing(self) -> StudentSpec:
        if self.model == "teacher" and self.layers is None and self.lora is None:
            raise ValueError("a student equal to its teacher has nothing to learn: set layers")
        return self

    @model_validator(mode="after")
    def _is_new_or_is_not(self) -> StudentSpec:
        if self.model == "new" and "model_type" not in (self.config or {}):
            raise ValueError(
                "a new model is made from a config: write config: {model_type: ..., its fields}"
            )
        if self.model != "new" and (self.config is not None or self.tokenizer is not None):
            raise ValueError("config and tokenizer are a new model's: write model: new")
        return self


class ResponsesSpec(KeptResponsesSpec):
    """Where the responses to the prompts come from."""

    by: Literal["dataset", "teacher"] = Field(
        "dataset", description="'dataset' keeps the data's own, 'teacher' generates them once"
    )


class OnPolicySpec(SpecModel):
    """Responses that the student samples while it is trained, in place of the data's."""

    policy: Literal["student", "interleaved"] = Field(
        "student",
        description="'student' samples every token; in 'interleaved' the teacher replaces those "
        "outside its top_k by its own",
    )
    probability: float = Field(
        0.5, ge=0, le=1, description="that a step learns from sampled responses, not the data's"
    )
    temperature: float = Field(1.0, ge=0, description="of the sampling; 0 is greedy")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw from the fewest tokens that have this chance; 1 is all",
    )
    max_new_tokens: PositiveInt = Field(128, description="longest sampled response, in tokens")
    batch_size: PositiveInt = Field(32, description="responses that a process samples at once")
    top_k: PositiveInt = Field(25, description="interleaved only")
    teacher_temperature: float | None = Field(
        None, ge=0, description="interleaved only: of the teacher's tokens; by default temperature"
    )

    @model_validator(mode="after")
    def _has_a_teacher_that_samples(self) -> OnPolicySpec:
        if self.teacher_temperature is not None and self.policy == "student":
            raise ValueError(
                "teacher_temperature is of policy 'interleaved', where the teacher samples too: "
                "set that policy, or leave it out"
            )
        return self


class DataSpec(RowsSpec):
    """What a student learns from."""

    responses: ResponsesSpec = DEFAULTS
    teacher_cache: InputPath | None = Field(
        None, description="train on the teacher's logits in this folder, see kdcore cache"
    )
    on_policy: OnPolicySpec | None = Field(
        None, description="train on responses that the student samples as it learns"
    )

    @model_validator(mode="after")
    def _has_a_teacher_to_ask(self) -> DataSpec:
        if self.on_policy is not None and self.teacher_cache is not None:
            raise ValueError(
                "teacher_cache knows the data's responses, and on_policy samples others: remove one"
            )
        return self


class StudentEvaluationSpec(EvaluationSpec):
    """The same of a student, after its training and before it."""

    before: Before = True


class DistillSpec(SpecModel):
    """Train a student from a teacher, or from the labels alone."""

    job: Literal["distill"] = "distill"
    run: Path = Field(Path("runs/distill"), description="the run folder")
    seed: Seed = 0
    teacher: ModelSpec | None = Field(
        None,
        description="none: what data.teacher_cache holds is learned or, where there is none, the "
        "labels alone, terms {task: 1, kd: 0}",
    )
    student: StudentSpec
    data: DataSpec
    method: MethodSpec = DEFAULTS
    training: TrainingSpec = DEFAULTS
    evaluation: StudentEvaluationSpec = DEFAULTS

    @model_validator(mode="after")
    def _measures_what_it_has(self) -> DistillSpec:
        refuse_nothing_to_measure(self.training, self.data)
        if self.evaluation.answers and self.data.heldout is None:
            raise ValueError("evaluation.answers judges held-out answers: set data.heldout")
        return self

    @model_validator(mode="after")
    def _has_the_teacher_it_names(self) -> DistillSpec:
        wanting = {
            "a student cut from its teacher": self.student.model == "teacher",
            "data.responses by the teacher": self.data.responses.by == "teacher",
            "data.on_policy": self.data.on_policy is not None,
        }
        for field in (field for field, wants in wanting.items() if wants and not self.teacher):
            raise ValueError(f"{field} needs a teacher, and there is none: set teacher")
        return self
