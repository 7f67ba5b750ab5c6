"""Further rows that a student learns from in each step, with weights of the terms of their own."""

from __future__ import annotations

from pydantic import Field

from kdcore.components.choice import SourceChoice
from kdcore.specs.parts.fields import Count, SpecModel
from kdcore.specs.parts.schedule import Schedule


class AuxiliarySpec(SpecModel):
    """Rows beside those of train: a corpus, earlier data to replay, or another domain."""

    source: SourceChoice = Field(description="source of the rows")
    batch_size: Count | None = Field(
        None, description="rows of a micro-batch of each process (default: training.batch_size)"
    )
    terms: dict[str, Schedule] = Field(
        {"task": 1.0},
        min_length=1,
        description="weight of each term of the loss on these rows; a term that is not named has "
        "weight 0 there",
    )
