"""What a spec says of generating data: who answers, what, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kdcore.components.choice import SourceChoice
from kdcore.specs.parts.endpoint import EndpointSpec, kind_of_teacher
from kdcore.specs.parts.fields import DEFAULTS, ModelSpec, RunFolder, SpecModel
from kdcore.specs.parts.training import GenerationSpec


class GenerateDataSpec(SpecModel):
    """Let a teacher answer prompts, into a file that the chat source reads."""

    job: Literal["generate-data"]
    run: RunFolder = Field(Path("runs/generate-data"), description="run folder")
    teacher: Annotated[
        Annotated[ModelSpec, Tag("a model")] | Annotated[EndpointSpec, Tag("an endpoint")],
        Discriminator(kind_of_teacher),
    ] = Field(
        description="teacher that answers the prompts: a model, as in a distill spec, or an "
        "endpoint"
    )
    source: SourceChoice = Field(
        description="source of the prompts; any responses in it are replaced"
    )
    responses: GenerationSpec = DEFAULTS

    @model_validator(mode="after")
    def _an_endpoint_has_its_own_engine(self) -> GenerateDataSpec:
        if isinstance(self.teacher, EndpointSpec) and self.responses.engine is not None:
            raise ValueError(
                "an endpoint runs its model with its own engine: remove responses.engine"
            )
        return self
