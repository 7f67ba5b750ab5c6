"""How a student learns: the method of a distill spec."""

from __future__ import annotations

from pydantic import Field

from kdcore.components.choice import AdvantageChoice, DivergenceChoice, MatcherChoice
from kdcore.specs.parts.on_policy import OnPolicySpec
from kdcore.specs.parts.training import Alignment, MethodSpec


class StudentMethodSpec(MethodSpec):
    """The method of a student, which may learn from its own responses in another way."""

    sampled_divergence: DivergenceChoice | None = Field(
        None,
        description="divergence on the responses that the student samples (data.on_policy); null "
        "means the same as on those in the data",
    )
    advantage: AdvantageChoice | None = Field(
        None,
        description="advantage of the tokens that the student samples (data.on_policy), for the "
        "term 'policy' of the loss, a policy gradient (weight: terms, default 1)",
    )
    matchers: list[MatcherChoice] = Field(
        [],
        description="matchers of hidden states or attention, each a term of the loss with the "
        "matcher's name (weight: terms, default 1)",
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
        description="rate of the moving average that moves the teacher's weights towards the "
        "student's after each optimizer step; 1 copies the student (default: the teacher does not "
        "change)",
    )


def refuse_without_samples(method: StudentMethodSpec, on_policy: OnPolicySpec | None) -> None:
    """Check that the student samples the responses for which a method has something of its own.

    Args:
        method: The method of a spec.
        on_policy: Its section ``data.on_policy``.

    Raises:
        ValueError: It does not, or not from its own distribution.
    """
    wanting = {
        "sampled_divergence applies to": method.sampled_divergence,
        "advantage weighs the tokens of": method.advantage,
    }
    for what in (what for what, asked in wanting.items() if asked is not None):
        if on_policy is None:
            raise ValueError(
                f"method.{what} responses that the student samples: set data.on_policy"
            )
    if method.advantage is None or on_policy is None:
        return
    sampler = on_policy.sampler
    unweighed = {
        "policy interleaved": on_policy.policy == "interleaved",
        f"{on_policy.warped}": on_policy.warped is not None,
        f"sampler.staleness {sampler and sampler.staleness}": sampler is not None
        and sampler.staleness > 0,
    }
    for field in (field for field, is_so in unweighed.items() if is_so):
        raise ValueError(
            f"method.advantage does not support data.on_policy.{field}, as the gradient would be "
            f"that of another distribution: remove {field.split()[0]}"
        )
