"""A run as data: what a spec file may say, with its types, defaults and JSON schema.

Every model is frozen and refuses unknown keys. Relative input paths are taken from the spec's own
folder; the run folder from the working directory.
"""

from __future__ import annotations

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
    model_validator,
)

from kdcore.choice import Divergence, Gate, Momentum, Source, Splitter
from kdcore.schedule import PositiveSchedule, Schedule


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return (Path(base) / path).resolve() if base is not None else path


InputPath: TypeAlias = Annotated[Path, AfterValidator(_from_base)]
"""A file to read: relative to the spec's folder. Plugins' params use it too."""

Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""How slowly a moving mean forgets."""

_DEFAULTS: Any = {}  # validated like what a user writes, so that names resolve when a spec is read
_FORWARD_KL: Any = "forward_kl"
_SHARED: Any = "shared"


class SpecModel(BaseModel):
    """Frozen, no unknown keys, defaults validated like anything else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class LoraSpec(SpecModel):
    """Train low-rank adapters (peft) instead of all weights."""

    r: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveFloat = Field(32.0, description="scale of the adapters")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="modules that get an adapter"
    )


class ModelSpec(SpecModel):
    """A model: a hub id, a folder, a GGUF file, or a GGUF file inside an installed package."""

    model: str = Field(
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
    model: str = Field(
        "teacher", description="'teacher' for a cut of the teacher, else as for the teacher"
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


class ResponsesSpec(SpecModel):
    """Where the responses to the prompts come from."""

    by: Literal["dataset", "teacher"] = Field(
        "dataset", description="'dataset' keeps the data's own, 'teacher' generates them once"
    )
    max_new_tokens: PositiveInt = Field(256, description="longest generated response, in tokens")
    batch_size: PositiveInt = Field(32, description="prompts generated at once")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")


class DataSpec(SpecModel):
    """What is learned from, and what is held out to measure."""

    train: Source
    heldout: Source | None = Field(None, description="never trained on; needed for the table")
    responses: ResponsesSpec = _DEFAULTS
    max_length: PositiveInt = Field(1024, description="longest row in tokens; longer ones are cut")


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
        description="weight of each term: 'task' (cross-entropy with the label, default 0) and "
        "each part that the splitters give (default 1)",
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
        "float32", description="autocast of the student's forward"
    )
    chunk: PositiveInt = Field(
        512, description="positions whose logits exist at once; memory only, not the result"
    )
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints")
    keep: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = 1
    eval_every: PositiveInt | None = Field(None, description="steps between held-out measurements")
    report_to: list[str] = Field([], description="trackers of transformers, e.g. tensorboard")
    trainer: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments"
    )


class EvaluationSpec(SpecModel):
    """What is measured on the held-out rows, before and after."""

    batch_size: PositiveInt = 8
    samples: int = Field(3, ge=0, description="held-out prompts answered side by side")
    sample_tokens: PositiveInt = Field(48, description="longest sample answer")


class DistillSpec(SpecModel):
    """Train a student from a teacher."""

    job: Literal["distill"]
    run: Path = Field(Path("runs/distill"), description="the run folder")
    seed: int = Field(0, ge=0, lt=2**32)
    teacher: ModelSpec
    student: StudentSpec
    data: DataSpec
    method: MethodSpec = _DEFAULTS
    training: TrainingSpec = _DEFAULTS
    evaluation: EvaluationSpec = _DEFAULTS

    @model_validator(mode="after")
    def _measures_what_it_has(self) -> DistillSpec:
        if self.training.eval_every and self.data.heldout is None:
            raise ValueError("training.eval_every measures held-out rows: set data.heldout")
        return self


JOBS: dict[str, type[SpecModel]] = {"distill": DistillSpec}
"""What ``job:`` may say."""
