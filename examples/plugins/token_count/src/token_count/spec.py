"""Spec of the job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from kdcore.components.choice import SourceChoice
from kdcore.specs.parts.fields import ModelSpec, SpecModel


class CountSpec(SpecModel):
    """Count the tokens of a data source."""

    job: Literal["count-tokens"]
    run: Path = Field(Path("runs/counts"), description="run folder")
    source: SourceChoice = Field(description="source of the rows to count")
    tokenizer: ModelSpec = Field(description="model whose tokenizer counts, without its weights")
    max_length: PositiveInt = Field(
        1024, description="maximum row length in tokens; longer rows are truncated"
    )
