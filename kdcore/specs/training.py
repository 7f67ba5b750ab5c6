"""The sections that every job that trains has: rows, method, training, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
)

from kdcore.method.choice import (
    Choice,
    DivergenceChoice,
    GateChoice,
    MomentumChoice,
    SourceChoice,
    SplitterChoice,
)
from kdcore.method.schedule import PositiveSchedule, Schedule
from kdcore.specs.fields import Beta, SpecModel

_FORWARD_KL: Any = "forward_kl"


_SHARED: Any = "shared"


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


class RowsSpec(SpecModel):
    """The rows of a job that trains: what is learned from, and what is held out to measure."""

    train: SourceChoice
    heldout: SourceChoice | None = Field(None, description="never trained on; needed for the table")
    max_length: PositiveInt = Field(1024, description="longest row in tokens; longer ones are cut")

    @property
    def sources(self) -> dict[str, Choice]:
        """Those there are, by the names of their fields."""
        return {"train": self.train} | ({"heldout": self.heldout} if self.heldout else {})


class MethodSpec(SpecModel):
    """The distillation objective: gate x splitter x divergence x momentum."""

    gates: list[GateChoice] = Field(
        [], description="their weights multiply; none means every token"
    )
    splitters: list[SplitterChoice] = Field([], description="chained; none means one part, 'kd'")
    divergence: DivergenceChoice = _FORWARD_KL
    momentum: MomentumChoice = _SHARED
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


def refuse_nothing_to_measure(training: TrainingSpec, data: RowsSpec) -> None:
    """For a validator of a job that trains. Raises ValueError."""
    if training.eval_every and not data.sources.keys() - {"train"}:
        raise ValueError("training.eval_every measures held-out rows: set data.heldout")
