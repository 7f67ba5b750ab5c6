"""How a student learns: the method of a distill spec."""

from __future__ import annotations

from pydantic import Field

from kdcore.components.choice import DivergenceChoice, MatcherChoice
from kdcore.specs.parts.training import Alignment, MethodSpec


class StudentMethodSpec(MethodSpec):
    """The method of a student, which may learn from its own responses in another way."""

    sampled_divergence: DivergenceChoice | None = Field(
        None,
        description="divergence on the responses that the student samples (data.on_policy); null "
        "means the same as on those in the data",
    )
    matchers: list[MatcherChoice] = Field(
        [],
        description="matchers of hidden states, each a term of the loss with the matcher's name "
        "(weight: terms, default 1)",
    )
    alignment: Alignment | None = Field(
        None,
        description="for a teacher with another tokenizer: the tokens at which the two models are "
        "compared. positions: the n-th token of a response with the n-th; spans: the first token "
        "of each span of text that ends in both tokenizations; spans_last: its last token. null "
        "requires one tokenizer",
    )
    teacher_follows: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share by which the teacher's weights move to the student's after each "
        "optimizer step, a moving average; 1 makes the teacher the student itself (default: the "
        "teacher does not change)",
    )
