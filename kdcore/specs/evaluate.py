"""Measuring a model, as data."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from kdcore.components.choice import EngineChoice, SourceChoice
from kdcore.specs.parts.fields import DEFAULTS, Count, Device, ModelSpec, SpecModel
from kdcore.specs.parts.training import EvaluationSpec


def _is_a_date(text: str) -> str:
    try:
        return str(date.fromisoformat(text))
    except ValueError:
        raise ValueError(f"{text!r} is not a date: write it as YYYY-MM-DD") from None


Date: TypeAlias = Annotated[str, AfterValidator(_is_a_date)] | None


class EvaluateSpec(SpecModel):
    """Measure any model, beside a teacher or alone."""

    job: Literal["evaluate"]
    device: Device = None
    model: ModelSpec
    teacher: ModelSpec | None = Field(None, description="teacher to compare the model with")
    heldout: SourceChoice | None = Field(None, description="source of the rows to measure on")
    max_length: Count = Field(
        1024, description="maximum row length in tokens; longer rows are truncated"
    )
    date: Date = Field(
        None, description="date that a chat template prints, as YYYY-MM-DD (default: today's)"
    )
    chunk: Count | None = Field(
        None,
        description="number of positions whose logits are computed at once; affects memory, "
        "not the result (default: 512 on a CPU; on an accelerator, as many as fit into an eighth "
        "of its memory)",
    )
    evaluation: EvaluationSpec = DEFAULTS
    engine: EngineChoice | None = Field(
        None,
        description="engine that runs the model when it answers prompts (default: openvino on a "
        "CPU where it is installed, converts the model and has 10,000 tokens or more to generate, "
        "otherwise torch)",
    )
    lm_eval: list[str] = Field(
        [], description="lm-eval tasks: names, or paths to YAML files (needs kdcore[lm-eval])"
    )

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateSpec:
        if self.heldout is None and not self.lm_eval:
            raise ValueError("there is nothing to evaluate on: set heldout or lm_eval")
        if self.heldout is None and (self.teacher is not None or self.evaluation.answers):
            raise ValueError("teacher and evaluation.answers need rows: set heldout")
        return self
