"""Measuring a model, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from kdcore.method.choice import SourceChoice
from kdcore.specs.fields import DEFAULTS, ModelSpec, SpecModel
from kdcore.specs.training import EvaluationSpec


class EvaluateSpec(SpecModel):
    """Measure any model, beside a teacher or alone."""

    job: Literal["evaluate"]
    model: ModelSpec
    teacher: ModelSpec | None = Field(None, description="measure how close the model is to it")
    heldout: SourceChoice | None = Field(None, description="the rows to measure on")
    max_length: PositiveInt = Field(1024, description="longest row in tokens; longer ones are cut")
    chunk: PositiveInt = Field(
        512, description="positions whose logits exist at once; memory only, not the result"
    )
    evaluation: EvaluationSpec = DEFAULTS
    lm_eval: list[str] = Field(
        [], description="tasks of lm-eval: names, or paths of YAML files (needs kdcore[lm-eval])"
    )

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateSpec:
        if self.heldout is None and not self.lm_eval:
            raise ValueError("nothing to measure on: set heldout, or lm_eval")
        if self.heldout is None and (self.teacher is not None or self.evaluation.answers):
            raise ValueError("teacher and evaluation.answers need rows: set heldout")
        return self
