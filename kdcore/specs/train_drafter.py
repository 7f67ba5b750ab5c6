"""Training a drafter, as data: what its spec says otherwise than a student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from kdcore.method.choice import Choice, DrafterChoice, GateChoice, SourceChoice
from kdcore.specs.distill import DistillSpec
from kdcore.specs.fields import DEFAULTS, ModelSpec, Seed, SpecModel
from kdcore.specs.training import (
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
        "target", description="'dataset' keeps the data's own, 'target' generates them once"
    )


class HiddenStatesSpec(SpecModel):
    """The target's hidden states, stored once instead of computed at every step."""

    folder: Path | None = Field(
        None, description="where they are kept, for other runs too; by default in the run folder"
    )
    limit_gb: PositiveFloat = Field(
        10.0, description="a run whose states would take more is refused before it computes any"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="how they are stored; bfloat16 rounds them to 8 bits of mantissa"
    )


class DraftDataSpec(RowsSpec):
    """What a drafter is trained on."""

    validation: SourceChoice | None = Field(
        None,
        description="the rows that the best drafter is chosen on every training.eval_every steps, "
        "and that are not reported; by default those of heldout, which flatters it",
    )
    responses: DraftResponsesSpec = DEFAULTS
    hidden_states: HiddenStatesSpec | None = Field(
        None, description="store those of data.train on disk; none: the target runs at every step"
    )

    @property
    def sources(self) -> dict[str, Choice]:
        """Those there are, by the names of their fields."""
        return super().sources | ({"validation": self.validation} if self.validation else {})


class DraftMethodSpec(MethodSpec):
    """The same parts as a student's, with a drafter's defaults."""

    gates: list[GateChoice] = Field(
        _DISCOUNT, description="their weights multiply; an empty list means every level alike"
    )
    normalize: Literal["sequence", "token", "accepted"] = Field(
        "token",
        description="mean over all levels of all anchors; over anchors of the mean over each one's "
        "levels; or over anchors of the gate-weighted mean",
    )


class DraftEvaluationSpec(SpecModel):
    """What is measured on the held-out rows, before, meanwhile and after."""

    batch_size: PositiveInt = 8
    candidates: PositiveInt = Field(10, description="k of the backbone tree whose tau is predicted")
    before: Before = True


class TrainDrafterSpec(SpecModel):
    """Train a drafter for a target."""

    job: Literal["train-drafter"]
    run: Path = Field(Path("runs/drafter"), description="the run folder")
    seed: Seed = 0
    target: ModelSpec
    drafter: DrafterChoice
    data: DraftDataSpec
    method: DraftMethodSpec = DEFAULTS
    training: TrainingSpec = DEFAULTS
    evaluation: DraftEvaluationSpec = DEFAULTS

    @model_validator(mode="after")
    def _measures_what_it_has(self) -> TrainDrafterSpec:
        refuse_nothing_to_measure(self.training, self.data)
        return self

    @model_validator(mode="after")
    def _chooses_on_other_rows(self) -> TrainDrafterSpec:
        chosen_on, reported = self.data.validation, self.data.heldout
        if chosen_on and not self.training.eval_every:
            raise ValueError(
                "data.validation chooses among drafters of several steps: set training.eval_every"
            )
        if chosen_on and reported and chosen_on.dump() == reported.dump():
            raise ValueError("data.validation has the rows that are reported: name others")
        return self


TrainedSpec: TypeAlias = DistillSpec | TrainDrafterSpec
"""What a job that trains is told."""
