"""Responses that a student samples during its training: by which policy, and where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import MOST_ITEMS, Count, InputPath, NonNegative, SpecModel


class SamplerSpec(EndpointSpec):
    """A vLLM server that samples the responses, with weights that the training sends."""

    staleness: Annotated[int, Field(ge=0, le=MOST_ITEMS)] = Field(
        0,
        description="maximum number of optimizer steps by which the server's weights are older "
        "than the student's; 0 sends them before each step that samples",
    )
    folder: InputPath | None = Field(
        None,
        description="folder for the weights, which the server reads under the same path "
        "(default: in the run folder)",
    )

    @property
    def described(self) -> str:
        """What it gives, for a report."""
        return f"{self.model} at {self.endpoint}, with weights at most {self.staleness} steps old"


class OnPolicySpec(SpecModel):
    """Responses that the student samples while it is trained, in place of the data's."""

    policy: Literal["student", "interleaved", "mixed"] = Field(
        "student",
        description="'student': the student samples every token; 'interleaved': the teacher "
        "replaces each token outside its own top_k; 'mixed': each token is sampled from a mixture "
        "of both distributions, and the loss weighs it by its importance",
    )
    probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability that a step trains on sampled responses instead of those in "
        "the data",
    )
    temperature: NonNegative = Field(1.0, description="sampling temperature; 0 is greedy decoding")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling threshold; 1 means all tokens",
    )
    max_new_tokens: Count = Field(128, description="maximum length of a sampled response in tokens")
    batch_size: Count = Field(
        32, description="number of responses that each process samples at once"
    )
    top_k: Count = Field(
        25,
        description="interleaved only: number of the teacher's most likely tokens that are "
        "accepted",
    )
    teacher_temperature: NonNegative | None = Field(
        None,
        description="interleaved only: sampling temperature of the teacher's tokens (default: "
        "temperature)",
    )
    teacher_share: float = Field(
        0.2, gt=0, lt=1, description="mixed only: share of the teacher in the mixture"
    )
    sampler: SamplerSpec | None = Field(
        None, description="server that samples the responses (default: the training process)"
    )

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher takes part in the sampling."""
        return self.policy != "student"

    @property
    def sampled(self) -> dict[str, Any]:
        """What a batch of sampled responses says of them; see `kdcore.method.records.Batch`."""
        share = self.teacher_share if self.policy == "mixed" else 0.0
        return {"sampled": True, "teacher_share": share}

    @model_validator(mode="after")
    def _has_a_teacher_that_samples(self) -> OnPolicySpec:
        if self.teacher_temperature is not None and self.policy != "interleaved":
            raise ValueError(
                "teacher_temperature applies only to policy=interleaved: set that policy, "
                "or remove teacher_temperature"
            )
        return self

    @model_validator(mode="after")
    def _samples_where_it_can(self) -> OnPolicySpec:
        if self.sampler is not None and self.reads_teacher:
            raise ValueError(
                f"a server samples from one model, and policy={self.policy} from two: set policy: "
                "student, or remove sampler"
            )
        return self

    @model_validator(mode="after")
    def _weighs_what_it_samples(self) -> OnPolicySpec:
        if self.policy == "mixed" and self.warped:
            raise ValueError(
                f"policy mixed does not support {self.warped}, as the importance of a token is "
                f"computed at temperature 1: remove {self.warped.split()[0]}"
            )
        return self

    @property
    def warped(self) -> str | None:
        """A field, and its value, by which the sampling leaves the distribution of the models."""
        asked = {"temperature": self.temperature, "top_p": self.top_p}
        return next((f"{name} {value:g}" for name, value in asked.items() if value != 1), None)


def sampled_with_teacher(on_policy: OnPolicySpec | None) -> dict[str, bool]:
    """The policy in which the teacher takes part, for a table of what a spec asks for.

    Args:
        on_policy: The section ``data.on_policy``.

    Returns:
        Field and value -> True; empty if the teacher does not take part.
    """
    if on_policy is None or not on_policy.reads_teacher:
        return {}
    return {f"data.on_policy.policy={on_policy.policy}": True}
