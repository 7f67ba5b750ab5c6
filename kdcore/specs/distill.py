"""A run as data: what a spec file may say, with its types, defaults and JSON schema.

Every model is frozen and refuses unknown keys. Relative input paths are taken from the spec's own
folder; the run folder from the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from kdcore.components.choice import Choice
from kdcore.specs.parts.auxiliary import AuxiliarySpec
from kdcore.specs.parts.endpoint import kind_of_teacher
from kdcore.specs.parts.fields import (
    AUTO,
    DEFAULTS,
    SHARDED,
    FolderOrUrl,
    LayerIndex,
    ModelName,
    ModelSpec,
    Positive,
    RunFolder,
    Seed,
    Size,
    SpecModel,
)
from kdcore.specs.parts.on_policy import OnPolicySpec, sampled_with_teacher
from kdcore.specs.parts.student_method import StudentMethodSpec, refuse_without_samples
from kdcore.specs.parts.teacher_prompt import (
    TeacherPrompt,
    refuse_with_following,
    refuse_with_prompt,
)
from kdcore.specs.parts.teachers import (
    ServedTeacherSpec,
    TeachersSpec,
    Weights,
    refuse_weights,
    refuse_with_several,
)
from kdcore.specs.parts.training import (
    Before,
    EvaluationSpec,
    KeptResponsesSpec,
    RowsSpec,
    TrainingSpec,
    refuse_nothing_to_measure,
)


class LoraSpec(SpecModel):
    """Train low-rank adapters (peft) instead of all weights."""

    r: Size = Field(16, description="rank of the adapters")
    alpha: Positive = Field(32.0, description="scaling factor (alpha) of the adapters")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="modules that get an adapter: names, or 'all-linear'"
    )


class StudentSpec(ModelSpec):
    """The student: a model of its own, or a cut of the teacher."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="dtype of the weights in memory; auto: the dtype of the files; float16 cannot "
        "be trained",
    )
    model: ModelName = Field(
        "teacher",
        description="'teacher' for a student cut from the teacher, 'new' for a new model made from "
        "config, or any model name that the teacher could have",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="config of a new model: {model_type: ..., FIELD: VALUE}, with the field "
        "names of transformers; labels come from the data",
    )
    tokenizer: ModelName | None = Field(
        None, description="tokenizer of a new model, given as a model name (default: the teacher's)"
    )
    layers: list[LayerIndex] | None = Field(
        None, description="layers to keep, e.g. [0, 1, 4, 7]; negative numbers count from the end"
    )
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _a_copy_learns_nothing(self) -> StudentSpec:
        if self.model == "teacher" and self.layers is None and self.lora is None:
            raise ValueError(
                "the student is identical to its teacher: set layers to keep only some of them"
            )
        return self

    @model_validator(mode="after")
    def _is_new_or_is_not(self) -> StudentSpec:
        if self.model == "new" and "model_type" not in (self.config or {}):
            raise ValueError(
                "a new student needs a config: write config: {model_type: ..., FIELD: VALUE}"
            )
        if self.model != "new" and (self.config is not None or self.tokenizer is not None):
            raise ValueError("config and tokenizer apply only to a new model: set model: new")
        return self

    @model_validator(mode="after")
    def _has_files_of_its_own(self) -> StudentSpec:
        for field in ("subfolder", "quantization", "adapter"):
            if self.model in ("teacher", "new") and getattr(self, field) is not None:
                raise ValueError(
                    f"{field} applies to the files of a model, and the student has none: set model "
                    f"to a hub id or folder, or remove {field}"
                )
        return self

    @model_validator(mode="after")
    def _is_trainable(self) -> StudentSpec:
        if self.device is not None:
            raise ValueError(
                "a student is trained on the devices of its processes: remove device, or shard the "
                "student with training.trainer.fsdp"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                "quantised weights cannot be trained, but adapters on them can: set lora, or "
                "remove quantization"
            )
        for field in ("adapter", "layers"):
            if self.quantization is not None and getattr(self, field) is not None:
                raise ValueError(
                    f"a quantised student does not support {field}: remove {field}, or remove "
                    "quantization"
                )
        return self


class ResponsesSpec(KeptResponsesSpec):
    """Where the responses to the prompts come from."""

    by: Literal["dataset", "teacher"] = Field(
        "dataset",
        description="'dataset' uses the responses in the data, 'teacher' generates new ones once",
    )


class DataSpec(RowsSpec):
    """What a student learns from."""

    responses: ResponsesSpec = DEFAULTS
    teacher_cache: FolderOrUrl | None = Field(
        None,
        description="folder of a teacher cache to train on (see `kdcore cache build`), or the URL "
        "of one, e.g. s3://bucket/folder",
    )
    on_policy: OnPolicySpec | None = Field(
        None, description="train on responses that the student samples during training"
    )
    auxiliary: AuxiliarySpec | None = Field(
        None,
        description="further rows that each step learns from beside those of train, with terms of "
        "their own",
    )
    teacher_prompt: TeacherPrompt | None = Field(
        None,
        description="last prompt of a conversation as the teacher reads it: {prompt} is the "
        "student's, {response} the response in the data, {FIELD} a field that the source keeps "
        "(default: the student's)",
    )

    @property
    def sources(self) -> dict[str, Choice]:
        """Those there are, by the names of their fields."""
        others = {} if self.auxiliary is None else {"auxiliary": self.auxiliary.source}
        return super().sources | others

    @model_validator(mode="after")
    def _has_a_teacher_to_ask(self) -> DataSpec:
        if self.on_policy is not None and self.teacher_cache is not None:
            raise ValueError(
                "teacher_cache and on_policy cannot be combined, as a cache covers only the "
                "responses in the data: remove one of them"
            )
        return self


class StudentEvaluationSpec(EvaluationSpec):
    """The same of a student, after its training and before it."""

    before: Before = True


class DistillSpec(SpecModel):
    """Train a student from a teacher, or from the labels alone."""

    job: Literal["distill"] = "distill"
    run: RunFolder = Field(Path("runs/distill"), description="run folder")
    seed: Seed = 0
    teacher: (
        Annotated[
            Annotated[ModelSpec, Tag("a model")] | Annotated[ServedTeacherSpec, Tag("an endpoint")],
            Discriminator(kind_of_teacher),
        ]
        | None
    ) = Field(
        None,
        description="teacher: a model, or a server (endpoint); leave it out to train on "
        "data.teacher_cache, or on labels alone with method.terms {task: 1, kd: 0}",
    )
    teachers: TeachersSpec = Field(
        {},
        description="several teachers by name, in place of teacher: models, servers (endpoint) or "
        "teacher caches (cache); a row names its own in its field `teacher`, and the "
        "distributions are averaged for the others",
    )
    teacher_weights: Weights = Field(
        {},
        description="weights of the teachers in the average, which are divided by their sum: "
        "{TEACHER: number or schedule}; a teacher without one has 0 (default: all 1)",
    )
    student: StudentSpec
    data: DataSpec
    method: StudentMethodSpec = DEFAULTS
    training: TrainingSpec = DEFAULTS
    evaluation: StudentEvaluationSpec = DEFAULTS

    @property
    def local_teacher(self) -> ModelSpec | None:
        """The teacher that this machine runs."""
        return self.teacher if isinstance(self.teacher, ModelSpec) else None

    @property
    def local_teachers(self) -> dict[str, ModelSpec]:
        """The several teachers that this machine runs, by name."""
        return {n: each for n, each in self.teachers.items() if isinstance(each, ModelSpec)}

    @property
    def has_teacher(self) -> bool:
        """Whether anything but labels teaches the student."""
        return bool(self.teacher or self.teachers or self.data.teacher_cache)

    @property
    def has_live_teacher(self) -> bool:
        """Whether all that teaches runs on this machine, also on rows that are not trained on."""
        several = bool(self.teachers) and len(self.local_teachers) == len(self.teachers)
        return several or self.local_teacher is not None

    @property
    def served_teacher(self) -> ServedTeacherSpec | None:
        """The teacher that servers run."""
        return self.teacher if isinstance(self.teacher, ServedTeacherSpec) else None

    @model_validator(mode="after")
    def _measures_what_it_has(self) -> DistillSpec:
        refuse_nothing_to_measure(self.training, self.data, chosen_by=self.training.keep_best)
        if self.evaluation.answers and self.data.heldout is None:
            raise ValueError("evaluation.answers needs held-out rows: set data.heldout")
        return self

    @model_validator(mode="after")
    def _has_one_template(self) -> DistillSpec:
        own = self.student.template or self.student.template_arguments
        if self.local_teacher and own and self.method.alignment is None:
            raise ValueError(
                "the template of the teacher encodes the rows, and the student keeps it: set "
                "template and template_arguments in teacher instead of student"
            )
        return self

    @model_validator(mode="after")
    def _has_several_teachers_or_one(self) -> DistillSpec:
        refuse_weights(self.teachers, self.teacher_weights)
        if self.teachers:
            refuse_with_several(self)
        if self.data.teacher_prompt is not None:
            refuse_with_prompt(self)
        if self.method.teacher_follows is not None:
            refuse_with_following(self)
        return self

    @model_validator(mode="after")
    def _samples_what_it_compares(self) -> DistillSpec:
        refuse_without_samples(self.method, self.data.on_policy)
        return self

    @model_validator(mode="after")
    def _has_what_the_sampler_serves(self) -> DistillSpec:
        """A server runs the student's folder; it gets all of its weights, or adapters on them."""
        student, policy = self.student, self.data.on_policy
        if policy is None or policy.sampler is None:
            return self
        if student.model in ("teacher", "new") or student.layers is not None:
            raise ValueError(
                "data.on_policy.sampler runs a model from a folder or the hub, and this student "
                "exists only after its training: save it first (a run of one step), and set "
                "student.model to the model folder of that run"
            )
        if student.lora is not None and student.adapter is not None:
            raise ValueError(
                "data.on_policy.sampler has the weights of student.model without student.adapter: "
                "merge the adapter into a folder and set student.model to it, or remove adapter"
            )
        return self

    @model_validator(mode="after")
    def _packs_rows_of_the_data(self) -> DistillSpec:
        unpacked = {
            "data.on_policy: a response that the student samples is not packed": (
                self.data.on_policy is not None
            ),
            "method.alignment: a teacher with another tokenizer reads rows of its own": (
                self.method.alignment is not None
            ),
        }
        for why in (why for why, is_so in unpacked.items() if is_so and self.training.packing):
            raise ValueError(
                f"training.packing cannot be combined with {why}: replace it by "
                "training.group_by_length: true"
            )
        return self

    @model_validator(mode="after")
    def _has_a_teacher_to_copy(self) -> DistillSpec:
        teacher = self.local_teacher
        if teacher is None or self.student.model != "teacher":
            return self
        spread = {
            "quantised": teacher.quantization is not None,
            "spread over devices": teacher.device in (AUTO, SHARDED),
        }
        for how in (how for how, is_so in spread.items() if is_so):
            raise ValueError(
                f"a teacher that is {how} cannot be copied: set student.model to {teacher.model} "
                "too, which loads it once more for the student"
            )
        return self

    @model_validator(mode="after")
    def _asks_a_sharded_teacher_in_step(self) -> DistillSpec:
        apart = {
            "data.responses.by=teacher": self.data.responses.by == "teacher",
            **sampled_with_teacher(self.data.on_policy),
        }
        for field in (field for field, asks in apart.items() if asks):
            if self.local_teacher and self.local_teacher.device == SHARDED:
                raise ValueError(
                    f"{field} asks the teacher in each process at its own pace, which one with "
                    "teacher.device=sharded cannot follow: generate the responses first (kdcore "
                    "generate-data), or remove teacher.device"
                )
        return self

    @model_validator(mode="after")
    def _has_the_teacher_it_names(self) -> DistillSpec:
        served, on_policy = self.served_teacher, self.data.on_policy
        local = {
            "a student cut from its teacher": self.student.model == "teacher",
            "data.responses.by=teacher": self.data.responses.by == "teacher",
            **sampled_with_teacher(on_policy),
        }
        for field in (field for field, wants in local.items() if wants and served):
            raise ValueError(
                f"{field} needs a teacher on this machine, but teacher names a server: set "
                "teacher.model to a model without teacher.endpoint"
            )
        wanting = local | {"data.on_policy": on_policy is not None}
        some = self.teacher or self.teachers
        for field in (field for field, wants in wanting.items() if wants and not some):
            raise ValueError(f"{field} needs a teacher: set teacher")
        if served and self.data.teacher_cache is not None:
            raise ValueError(
                "teacher names a server, and data.teacher_cache another teacher of the same rows: "
                "remove one of them"
            )
        return self
