"""The sections that every job that trains has: rows, method, training, evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, model_validator

from kdcore.components.choice import (
    Choice,
    DivergenceChoice,
    EngineChoice,
    GateChoice,
    MomentumChoice,
    ScoreChoice,
    SourceChoice,
    SplitterChoice,
)
from kdcore.specs.parts.fields import (
    MOST_ITEMS,
    Beta,
    Count,
    Index,
    NonNegative,
    Positive,
    Seed,
    SpecModel,
)
from kdcore.specs.parts.schedule import Schedule, Temperature

_FORWARD_KL: Any = "forward_kl"


_SHARED: Any = "shared"

Alignment: TypeAlias = Literal["positions", "spans", "spans_last"]
"""Which tokens of two tokenizations are compared; see
`kdcore.specs.parts.student_method.StudentMethodSpec`."""


class GenerationSpec(SpecModel):
    """How responses are generated."""

    max_new_tokens: Count = Field(
        256, description="maximum length of a generated response in tokens"
    )
    batch_size: Count = Field(32, description="number of prompts answered at once")
    temperature: NonNegative = Field(0.0, description="sampling temperature; 0 is greedy decoding")
    seed: Seed = Field(0, description="sampling seed; independent of the seed of the run")
    engine: EngineChoice | None = Field(
        None,
        description="engine that runs the model (default: openvino on a CPU where it is installed, "
        "converts the model and has 10,000 tokens or more to generate, otherwise torch)",
    )

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a model answers, as plain data."""
        found: dict[str, Any] = self.model_dump(include={"max_new_tokens", "temperature"})
        if self.temperature:
            found["seed"] = self.seed
        if self.engine is not None and self.engine.params != type(self.engine.params)():
            found["engine"] = self.engine.dump()  # it may round
        return found


class KeptResponsesSpec(GenerationSpec):
    """How responses are generated that a run learns from, and where they stay."""

    folder: Path | None = Field(
        None, description="folder for generated responses (default: in the run folder)"
    )


_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def or_a_share(schema: dict[str, Any]) -> None:
    """Add a share of the training rows to the JSON schema of a source."""
    schema["anyOf"] = [*schema["anyOf"], {"type": "string", "pattern": f"^{_SHARE.pattern}$"}]


class RowsSpec(SpecModel):
    """The rows of a job that trains: what is learned from, and what is held out to measure."""

    train: SourceChoice
    heldout: SourceChoice | None = Field(
        None,
        description="source of held-out rows, never trained on; the results are measured on them. "
        "A share, e.g. 10 %, takes them from the rows of train",
        json_schema_extra=or_a_share,
    )
    validation: SourceChoice | None = Field(
        None,
        description="rows used to choose the best model, every training.eval_every steps; not used "
        "for the reported results (default: heldout, which biases those results upwards). A share, "
        "e.g. 10 %, takes them from the rows of train",
        json_schema_extra=or_a_share,
    )
    max_length: Count = Field(
        1024, description="maximum row length in tokens; longer rows are truncated"
    )
    workers: Count | None = Field(
        None,
        description="number of processes that encode the rows, which then stay in the cache "
        "(default: one for each CPU, or one where more would not pay)",
    )

    @model_validator(mode="before")
    @classmethod
    def _takes_shares_of_train(cls, data: Any, info: ValidationInfo) -> Any:
        """Replace shares by parts of the training source."""
        fields = ("heldout", "validation")
        given = {name: data.get(name) for name in fields} if isinstance(data, dict) else {}
        given = {n: {"name": v} if isinstance(v, str) else v for n, v in given.items()}
        named = {n: v for n, v in given.items() if isinstance(v, dict)}
        matches = {n: _SHARE.fullmatch(str(v.get("name")).strip()) for n, v in named.items()}
        shares = {name: float(match[1]) / 100 for name, match in matches.items() if match}
        if not shares:
            return data
        parts = parts_of(data.get("train"), shares, info)
        own = {n: {k: v for k, v in named[n].items() if k != "name"} for n in shares}
        return data | parts | {n: parts[n] | own[n] for n in shares if parts[n]}

    @property
    def sources(self) -> dict[str, Choice]:
        """Those there are, by the names of their fields."""
        every = {"train": self.train, "heldout": self.heldout, "validation": self.validation}
        return {name: source for name, source in every.items() if source is not None}


def source_field(name: str) -> str:
    """The field of a source, as ``--set`` takes it.

    Args:
        name: Its key in `RowsSpec.sources`.
    """
    return f"data.{name}.source" if name == "auxiliary" else f"data.{name}"


_SOURCE: TypeAdapter[Choice] = TypeAdapter(SourceChoice)


def parts_of(train: Any, shares: Mapping[str, float], info: ValidationInfo) -> dict[str, Any]:
    """Divide a source of training rows.

    Args:
        train: The training source, as a spec gives it.
        shares: Field of ``data`` -> share of the rows of ``train``.
        info: Context of the validation, with the registry.

    Returns:
        Field of ``data`` -> source. The parts do not overlap, and together have the part and, if
        it is set, the limit of ``train``.

    Raises:
        ValueError: The shares leave nothing, or the source cannot read a part of its rows.
    """
    field, left = next(iter(shares)), 1 - sum(shares.values())
    if left <= 0 or not all(shares.values()):
        raise ValueError(
            f"{' and '.join(shares)} must leave rows for training: write a share between 0 % and "
            "100 %, e.g. 10 %"
        )
    try:
        choice = _SOURCE.validate_python(train, context=info.context)
    except ValidationError:
        return dict.fromkeys(shares)  # the field train is the mistake
    source = choice.dump()
    if "part" not in source:
        raise ValueError(
            f"{field} is a share of train, and source '{choice.name}' does not read a part of "
            "its rows: name a source of held-out rows"
        )
    (low, high), limit = source["part"], source.get("limit")
    found, width = {}, high - low
    for name, share in {"train": left, **shares}.items():
        end = high if name == [*shares][-1] else round(low + share * width, 9)
        found[name] = {**source, "part": [low, end]}
        if limit is not None:
            found[name]["limit"] = max(1, round(limit * share))
        low = end
    return found


class MethodSpec(SpecModel):
    """The distillation objective: gate x splitter x divergence x momentum."""

    gates: list[GateChoice] = Field(
        [], description="gates whose weights are multiplied; an empty list keeps every token"
    )
    splitters: list[SplitterChoice] = Field(
        [], description="splitters, applied in order; an empty list leaves one part, 'kd'"
    )
    divergence: DivergenceChoice = _FORWARD_KL
    divergences: dict[str, DivergenceChoice] = Field(
        {},
        description="divergences of single parts that the splitters make: {PART: divergence} "
        "(default: divergence)",
    )
    momentum: MomentumChoice = _SHARED
    tau: Temperature = Field(
        1.0, description="temperature of the loss; the loss is multiplied by tau^2"
    )
    terms: dict[str, Schedule] = Field(
        {},
        description="weight of each term: 'task' (cross-entropy with the label, default 0), "
        "'label' (the same, to which gates apply, default 0), "
        "'feature' (distance between the hidden states before the output heads, "
        "default 0) and each part that the splitters make (default 1)",
    )
    normalize: Literal["sequence", "token", "accepted"] = Field(
        "sequence",
        description="sequence: mean over sequences of the mean over each one's tokens; "
        "token: mean over all tokens; accepted: mean over sequences of the "
        "gate-weighted mean",
    )


class TrainingSpec(SpecModel):
    """How long and how fast; carried out by transformers.Trainer."""

    epochs: Positive = Field(
        1.0, description="number of passes over the data; ignored when steps is set"
    )
    steps: Count | None = Field(None, description="number of optimizer steps")
    batch_size: Count = Field(8, description="rows per device and micro-batch")
    accumulation: Count = Field(1, description="micro-batches per optimizer step")
    packing: bool = Field(
        False,
        description="join short rows to sequences of up to data.max_length tokens, which do not "
        "attend to each other; batch_size then counts these sequences",
    )
    group_by_length: bool = Field(
        False, description="make batches of rows of similar lengths, to limit the padding"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-4
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup", "multi_step"] = (
        "cosine"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps used for warm-up")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [],
        description="multi_step only: shares of the training after which the learning rate is "
        "multiplied by milestone_factor",
    )
    milestone_factor: Positive = Field(
        0.1, description="multi_step only: factor of the learning rate at each milestone"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only: momentum")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adamw only: beta1 and beta2")
    weight_decay: NonNegative = 0.0
    clip: NonNegative = Field(1.0, description="maximum gradient norm; 0 disables clipping")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="autocast dtype of the forward passes, including the teacher's"
    )
    chunk: Count | None = Field(
        None,
        description="number of positions whose logits are computed at once; affects memory, "
        "not the result (default: 512 on a CPU; on an accelerator, as many as fit into an eighth "
        "of its memory)",
    )
    save_every: Count | None = Field(None, description="steps between checkpoints")
    keep: Count = Field(2, description="number of checkpoints to keep")
    log_every: Count = 1
    eval_every: Count | None = Field(
        None,
        description="number of steps between evaluations on data.validation or, without it, on "
        "data.heldout",
    )
    keep_best: str | None = Field(
        None,
        description="figure that chooses the saved model among these evaluations, e.g. teacher_kl, "
        "accuracy or a score of evaluation.answers (default: a student of the last step, a drafter "
        "with the best tau)",
    )
    patience: Count | None = Field(
        None,
        description="number of these evaluations in a row without a better figure after which the "
        "training stops (default: never)",
    )
    probe_every: Count | None = Field(
        None,
        description="number of steps between measurements of the gradients of the terms "
        "(gsnr/TERM) and of the momenta (momentum_norm/NAME)",
    )
    probe_batches: Annotated[int, Field(ge=2, le=MOST_ITEMS)] = Field(
        16,
        description="number of mini-batches of batch_size rows in each of these measurements",
    )
    probe_layers: bool = Field(
        False,
        description="measure the gradients of each layer too (gsnr_layer/TERM/LAYER), when "
        "probe_every is set",
    )
    report_to: list[str] = Field(
        [], description="experiment trackers of transformers, e.g. tensorboard"
    )
    trainer: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments"
    )

    @model_validator(mode="after")
    def _milestones_are_of_multi_step(self) -> TrainingSpec:
        if bool(self.milestones) != (self.schedule == "multi_step"):
            raise ValueError(
                "schedule=multi_step and milestones need each other: write e.g. "
                "schedule: multi_step and milestones: [0.5, 0.75], or remove both"
            )
        return self

    @model_validator(mode="after")
    def _limits_the_padding_once(self) -> TrainingSpec:
        if self.packing and self.group_by_length:
            raise ValueError(
                "packing leaves nothing for group_by_length, as all sequences are about as long: "
                "remove one of them"
            )
        return self


class EvaluationSpec(SpecModel):
    """What is measured on the held-out rows."""

    batch_size: Count = 8
    samples: Index = Field(3, description="number of held-out prompts to show sample answers for")
    sample_tokens: Count = Field(48, description="maximum length of a sample answer in tokens")
    answers: list[ScoreChoice] = Field(
        [],
        description="scores of greedy answers to all held-out prompts, e.g. rouge_l, exact_match, "
        "math, pass_at_1 or win_rate",
    )
    answer_tokens: Count = Field(
        256, description="maximum length of an answer for these scores, in tokens"
    )

    @model_validator(mode="after")
    def _scores_once(self) -> EvaluationSpec:
        names = [choice.name for choice in self.answers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"answers names the score {twice} twice: remove one of them")
        return self


Before: TypeAlias = Annotated[
    bool,
    Field(
        description="evaluate before training as well as after it (default: false in a comparison)",
    ),
]
"""A field of what every job that trains measures."""


def refuse_nothing_to_measure(
    training: TrainingSpec, data: RowsSpec, *, chosen_by: str | None
) -> None:
    """For a validator of a job that trains.

    Args:
        training: How the job trains.
        data: Its rows.
        chosen_by: Figure that chooses the model; None keeps that of the last step.

    Raises:
        ValueError: A field asks for a measurement that the others do not make.
    """
    if training.eval_every and not (data.heldout or data.validation):
        raise ValueError("training.eval_every needs held-out rows: set data.heldout")
    for field in ("keep_best", "patience"):
        if getattr(training, field) is not None and not training.eval_every:
            raise ValueError(
                f"training.{field} reads the evaluations during the training: set "
                "training.eval_every"
            )
    if training.patience and chosen_by is None:
        raise ValueError("training.patience needs a figure: set training.keep_best")
    if data.validation and not (training.eval_every and chosen_by):
        raise ValueError(
            "data.validation has no effect without training.eval_every"
            + (": set training.eval_every" if chosen_by else " and training.keep_best: set both")
        )
    if data.validation and data.heldout and data.validation.dump() == data.heldout.dump():
        raise ValueError(
            "data.validation uses the same rows as data.heldout: choose different rows"
        )
