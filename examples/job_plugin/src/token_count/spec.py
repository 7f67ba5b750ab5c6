"""What a spec of the job says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from kdcore.method.choice import SourceChoice
from kdcore.specs.fields import ModelSpec, SpecModel


class CountSpec(SpecModel):
    """Count the tokens of a data source."""

    job: Literal["count-tokens"]
    run: Path = Field(Path("runs/counts"), description="the run folder")
    source: SourceChoice = Field(description="the rows to count")
    tokenizer: ModelSpec = Field(description="whose tokenizer counts; no weights are read")
    max_length: PositiveInt = Field(1024, description="longest row in tokens; longer ones are cut")
