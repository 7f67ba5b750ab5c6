"""Parameters of the baselines. This module does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from kdcore import GateChoice, Params
from kdcore.specs.parts.fields import Count, ModelName, Positive


class MiniLLM(Params):
    """Parameters of the minillm advantage."""

    length_norm: bool = Field(
        default=True,
        description="whether the rewards of the later tokens are averaged; false: summed, so that "
        "long responses weigh more",
    )
    own: bool = Field(
        default=False,
        description="whether the reward of the token itself counts too; false leaves it to the "
        "term kd, with divergence: reverse_kl (single-step decomposition)",
    )
    gamma: float = Field(
        default=1.0, ge=0, le=1, description="discount of a reward for each token in between"
    )
    clip: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=0.2,
        description="distance from 1 of the importance beyond which a token is left out if its "
        "gradient would increase the distance, as PPO does; null keeps all tokens",
    )


class Random(Params):
    """Parameters of the random gate."""

    rate: float = Field(ge=0, le=1, description="probability of keeping a position", examples=[0.5])
    floor: float = Field(default=0.0, ge=0, le=1, description="weight of the other positions")


class Uniform(Params):
    """Parameters of the uniform gate."""

    weight: float = Field(ge=0, le=1, description="weight of every position", examples=[0.5])


class Inverted(Params):
    """Parameters of the inverted gate."""

    gate: GateChoice = Field(
        description="gate whose rejected positions this gate keeps", examples=["entropy"]
    )


class Entropy(Params):
    """Parameters of the entropy gate; H is the teacher's entropy."""

    threshold: Positive | None = Field(
        default=None,
        description="entropy in nats below which positions are kept; null means the weight "
        "1 - H / log V",
    )


class Confidence(Params):
    """Parameters of the confidence gate."""

    threshold: float = Field(
        default=0.7, ge=0, lt=1, description="maximum probability above which positions are kept"
    )


class StudentEntropy(Params):
    """Parameters of the student_entropy gate."""

    fraction: float = Field(default=0.2, gt=0, le=1, description="fraction of positions to keep")


class Hellinger(Params):
    """Parameters of the hellinger gate."""

    fraction: float = Field(default=0.5, gt=0, le=1, description="fraction of positions to keep")


class AdaSPEC(Params):
    """Parameters of the adaspec gate."""

    reference: ModelName = Field(
        description="hub id, folder or GGUF file of the reference model, e.g. an earlier state of "
        "the student or a student distilled without a gate",
        examples=["runs/ungated/model"],
    )
    fraction: float = Field(default=0.4, gt=0, le=1, description="fraction of positions to keep")


class Discount(Params):
    """Parameters of the discount gate."""

    gamma: float = Field(
        default=0.8, gt=0, le=1, description="base of the weight gamma^i of position i, from 0"
    )


class ByPosition(Params):
    """Parameters of the by_position splitter."""

    positions: Count = Field(
        description="number of parts, e.g. the depth of a drafter; later positions belong to the "
        "last part",
        examples=[3],
    )


class JSD(Params):
    """Parameters of the jsd divergence."""

    beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="teacher's share of the mixture; 0 means forward KL, 1 means reverse KL",
    )


class Skew(Params):
    """Parameters of the skewed divergences."""

    alpha: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of the first distribution in the mixture; near 0 gives the plain KL",
    )


class SkewReverse(Skew):
    """Parameters of the skew_reverse_kl divergence."""

    detached: bool = Field(
        default=False, description="treat the mixture as a constant, as DistiLLM-2 does"
    )


def _zero_or_not_near(power: float) -> float:
    if 0 < power < 0.1:
        raise ValueError("must be 0 or at least 0.1: write 0 for the limit")
    return power


Power = Annotated[float, Field(ge=0, le=4), AfterValidator(_zero_or_not_near)]
"""An exponent of probabilities; a smaller one than 0.1 would give excluded classes a weight."""


class AlphaBeta(Params):
    """Parameters of the alpha_beta divergence."""

    alpha: Power = Field(
        default=0.2, description="exponent of the teacher's probability; 0, or at least 0.1"
    )
    beta: Power = Field(
        default=0.7, description="exponent of the student's probability; 0, or at least 0.1"
    )

    @model_validator(mode="after")
    def _is_not_both_zero(self) -> AlphaBeta:
        if self.alpha == self.beta == 0:
            raise ValueError(
                "alpha and beta must not both be 0: write alpha: 1 for forward KL, or beta: 1 for "
                "reverse KL"
            )
        return self


class AKL(Params):
    """Parameters of the akl divergence."""

    mass: float = Field(
        default=0.5, ge=0, le=1, description="teacher's probability mass that defines the head"
    )


class TAID(Params):
    """Parameters of the taid divergence."""

    start: float = Field(default=0.4, ge=0, le=1, description="teacher's share at the start")
    end: float = Field(default=1.0, ge=0, le=1, description="teacher's share at the end")
    alpha: float = Field(
        default=5e-4,
        ge=0,
        le=1,
        description="maximum change of the share in a step; 0 means a linear schedule",
    )
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="decay of the running mean of the loss improvement"
    )
