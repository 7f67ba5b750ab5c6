"""Training a drafter, as data: what its spec says otherwise than a student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from kdcore.components.choice import DrafterChoice, GateChoice
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import (
    DEFAULTS,
    Count,
    ModelSpec,
    Positive,
    RunFolder,
    Seed,
    SpecModel,
)
from kdcore.specs.parts.training import (
    Before,
    KeptResponsesSpec,
    MethodSpec,
    RowsSpec,
    TrainingSpec,
    refuse_nothing_to_measure,
)

_DISCOUNT: Any = ["discount"]


class DraftResponsesSpec(KeptResponsesSpec):
    """Where the responses come from; a drafter learns best from the target's own."""

    by: Literal["dataset", "target"] = Field(
        "target",
        description="'dataset' uses the responses in the data, 'target' generates new ones once",
    )


class HiddenStatesSpec(SpecModel):
    """The target's hidden states, stored once instead of computed at every step."""

    folder: Path | None = Field(
        None,
        description="folder for the stored states, which other runs can share (default: in the run "
        "folder)",
    )
    limit_gb: Positive = Field(
        10.0,
        description="maximum size on disk in GB; a run that would need more stops before it starts",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="dtype of the stored states; bfloat16 rounds them to 8 bits of mantissa",
    )


class DraftDataSpec(RowsSpec):
    """What a drafter is trained on."""

    responses: DraftResponsesSpec = DEFAULTS
    hidden_states: HiddenStatesSpec | None = Field(
        None,
        description="store the target's hidden states for data.train on disk (default: run "
        "the target at every step)",
    )


class DraftMethodSpec(MethodSpec):
    """The same parts as a student's, with a drafter's defaults."""

    gates: list[GateChoice] = Field(
        _DISCOUNT,
        description="gates whose weights are multiplied; an empty list gives every level the "
        "same weight",
    )
    normalize: Literal["sequence", "token", "accepted"] = Field(
        "token",
        description="token: mean over all levels of all anchors; sequence: mean over anchors "
        "of the mean over each anchor's levels; accepted: mean over anchors of "
        "the gate-weighted mean",
    )


class DraftEvaluationSpec(SpecModel):
    """What is measured on the held-out rows, before, meanwhile and after."""

    batch_size: Count = 8
    candidates: Count = Field(
        10, description="number of candidates (k) of the backbone tree that tau is predicted for"
    )
    before: Before = True


class TrainDrafterSpec(SpecModel):
    """Train a drafter for a target."""

    job: Literal["train-drafter"]
    run: RunFolder = Field(Path("runs/drafter"), description="run folder")
    seed: Seed = 0
    target: ModelSpec
    drafter: DrafterChoice
    data: DraftDataSpec
    method: DraftMethodSpec = DEFAULTS
    training: TrainingSpec = DEFAULTS
    evaluation: DraftEvaluationSpec = DEFAULTS

    @model_validator(mode="after")
    def _is_where_its_drafter_is(self) -> TrainDrafterSpec:
        if self.target.device is not None:
            raise ValueError(
                "a drafter reads its target's hidden states on the device of its process: remove "
                "target.device; target.quantization makes a target smaller"
            )
        return self

    @model_validator(mode="after")
    def _reads_one_row_at_a_time(self) -> TrainDrafterSpec:
        if self.training.packing:
            raise ValueError(
                "a drafter's layers attend to the whole sequence before a token, so they would "
                "mix packed rows: replace training.packing by training.group_by_length: true"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_it_has(self) -> TrainDrafterSpec:
        chosen_by = self.training.keep_best or "tau"
        refuse_nothing_to_measure(self.training, self.data, chosen_by=chosen_by)
        return self


TrainedSpec: TypeAlias = DistillSpec | TrainDrafterSpec
"""What a job that trains is told."""
