"""A run as data: what a spec file may say, with its types, defaults and JSON schema.

Every model is frozen and refuses unknown keys. Relative input paths are taken from the spec's own
folder; the run folder from the working directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from kdcore.choice import Choice, Divergence, Gate, Momentum, Source, Splitter
from kdcore.schedule import PositiveSchedule, Schedule


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return (Path(base) / path).resolve() if base is not None else path


InputPath: TypeAlias = Annotated[Path, AfterValidator(_from_base)]
"""A file to read: relative to the spec's folder. Plugins' params use it too."""

Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""How slowly a moving mean forgets."""

_NAME = "[a-z0-9][a-z0-9_-]*"


def _is_a_folders(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            "is no name here: write small letters, digits, - and _, a letter or digit in front"
        )
    return name


Name: TypeAlias = Annotated[
    str,
    AfterValidator(_is_a_folders),
    WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"}),
]
"""What a spec calls something of its own, as an arm: it may become the name of a folder."""

DEFAULTS: Any = {}  # validated like what a user writes, so that names resolve when a spec is read
_FORWARD_KL: Any = "forward_kl"
_SHARED: Any = "shared"


class SpecModel(BaseModel):
    """Frozen, no unknown keys, defaults validated like anything else."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,
    )


class LoraSpec(SpecModel):
    """Train low-rank adapters (peft) instead of all weights."""

    r: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveFloat = Field(32.0, description="scale of the adapters")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="modules that get an adapter"
    )


def _is_named(model: str) -> str:
    """An empty name would be read as the working directory."""
    if not model.strip():
        raise ValueError("is empty: name a hub id, a folder or a GGUF file")
    return model


ModelName: TypeAlias = Annotated[str, AfterValidator(_is_named)]
"""What names a model. Plugins' params use it too."""


class ModelSpec(SpecModel):
    """A model: a hub id, a folder, a GGUF file, or a GGUF file inside an installed package."""

    model: ModelName = Field(
        description="hub id, folder, path/to/file.gguf, or package:NAME/file.gguf",
    )
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the weights in memory"
    )
    trust_remote_code: bool = Field(False, description="run code that the model's repository ships")


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


class GenerationSpec(SpecModel):
    """How responses are generated."""

    max_new_tokens: PositiveInt = Field(256, description="longest generated response, in tokens")
    batch_size: PositiveInt = Field(32, description="prompts answered at once")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    seed: int = Field(0, description="of sampled responses; the run's own seed is another")


class KeptResponsesSpec(GenerationSpec):
    """How responses are generated that a run learns from, and where they stay."""

    folder: Path | None = Field(
        None, description="where generated responses are kept; by default in the run folder"
    )


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


class RowsSpec(SpecModel):
    """The rows of a job that trains: what is learned from, and what is held out to measure."""

    train: Source
    heldout: Source | None = Field(None, description="never trained on; needed for the table")
    max_length: PositiveInt = Field(1024, description="longest row in tokens; longer ones are cut")

    @property
    def sources(self) -> dict[str, Choice]:
        """Those there are, by the names of their fields."""
        return {"train": self.train} | ({"heldout": self.heldout} if self.heldout else {})


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


class MethodSpec(SpecModel):
    """The distillation objective: gate x splitter x divergence x momentum."""

    gates: list[Gate] = Field([], description="their weights multiply; none means every token")
    splitters: list[Splitter] = Field([], description="chained; none means one part, 'kd'")
    divergence: Divergence = _FORWARD_KL
    momentum: Momentum = _SHARED
    tau: PositiveSchedule = Field(
        1.0, description="loss temperature; the loss is multiplied by tau^2"
    )
    terms: dict[str, Schedule] = Field(
        {},
        description="weight of each term: 'task' (cross-entropy with the label, default 0), "
        "'feature' (distance of the hidden states that the heads read, default 0) and each part "
        "that the splitters give (default 1)",
    )
    normalize: Literal["sequence", "token", "accepted"] = Field(
        "sequence",
        description="mean over sequences of the mean over each one's tokens; over all tokens; or "
        "over sequences of the gate-weighted mean",
    )


class TrainingSpec(SpecModel):
    """How long and how fast; carried out by transformers.Trainer."""

    epochs: PositiveFloat = Field(1.0, description="ignored when steps is set")
    steps: PositiveInt | None = Field(None, description="optimiser steps")
    batch_size: PositiveInt = Field(8, description="rows per device and micro-batch")
    accumulation: PositiveInt = Field(1, description="micro-batches per optimiser step")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adamw only")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="autocast of the forward passes of a step, the teacher's too"
    )
    chunk: PositiveInt = Field(
        512, description="positions whose logits exist at once; memory only, not the result"
    )
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints")
    keep: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = 1
    eval_every: PositiveInt | None = Field(None, description="steps between held-out measurements")
    probe_every: PositiveInt | None = Field(
        None,
        description="steps between measurements of the terms' gradients (gsnr/TERM) and of the "
        "momenta (momentum_norm/NAME)",
    )
    probe_batches: int = Field(
        16, ge=2, description="mini-batches, of batch_size rows, that such a measurement takes"
    )
    report_to: list[str] = Field([], description="trackers of transformers, e.g. tensorboard")
    trainer: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments"
    )


class EvaluationSpec(SpecModel):
    """What is measured on the held-out rows."""

    batch_size: PositiveInt = 8
    samples: int = Field(3, ge=0, description="held-out prompts answered side by side")
    sample_tokens: PositiveInt = Field(48, description="longest sample answer")
    answers: list[Literal["rouge_l", "exact_match"]] = Field(
        [],
        description="figures of the greedy answers to all held-out prompts, beside the responses "
        "that the data have",
    )
    answer_tokens: PositiveInt = Field(256, description="longest answer that they judge, in tokens")


Before: TypeAlias = Annotated[
    bool,
    Field(
        description="measure before the training as well as after it; in a comparison false "
        "unless it is set",
    ),
]
"""A field of what every job that trains measures."""


class StudentEvaluationSpec(EvaluationSpec):
    """The same of a student, after its training and before it."""

    before: Before = True


def refuse_nothing_to_measure(training: TrainingSpec, data: RowsSpec) -> None:
    """For a validator of a job that trains. Raises ValueError."""
    if training.eval_every and not data.sources.keys() - {"train"}:
        raise ValueError("training.eval_every measures held-out rows: set data.heldout")


Seed: TypeAlias = Annotated[
    int,
    Field(
        ge=0,
        lt=2**32,
        description="of the order of the data, of new weights, of dropout, of gates and generation "
        "that draw",
    ),
]


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
