"""The parameters of the baselines that have any. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from kdcore import GateChoice, Params
from kdcore.specs.fields import ModelName


class Random(Params):
    """A coin for each position."""

    rate: float = Field(
        ge=0, le=1, description="probability that a position is kept", examples=[0.5]
    )
    floor: float = Field(default=0.0, ge=0, le=1, description="weight of the other positions")


class Uniform(Params):
    """A constant."""

    weight: float = Field(ge=0, le=1, description="weight of every position", examples=[0.5])


class Inverted(Params):
    """A gate turned round."""

    gate: GateChoice = Field(
        description="the gate whose refused positions are kept instead", examples=["entropy"]
    )


class Entropy(Params):
    """By the teacher's entropy H."""

    threshold: float | None = Field(
        default=None,
        gt=0,
        description="keep the positions with H below it, in nats; none: weight 1 - H / log V",
    )


class Confidence(Params):
    """By the teacher's largest probability."""

    threshold: float = Field(default=0.7, ge=0, lt=1, description="keep the positions above it")


class StudentEntropy(Params):
    """By rank."""

    fraction: float = Field(
        default=0.2, gt=0, le=1, description="share of the positions that is kept"
    )


class Hellinger(Params):
    """By rank. The published schedule of the fraction is not part of this gate."""

    fraction: float = Field(
        default=0.5, gt=0, le=1, description="share of the positions that is kept"
    )


class AdaSPEC(Params):
    """By rank, beside a third model."""

    reference: ModelName = Field(
        description="hub id, folder or GGUF file of the model that the student is held against, "
        "such as an earlier state of it, or one distilled without a gate",
        examples=["runs/ungated/model"],
    )
    fraction: float = Field(
        default=0.4, gt=0, le=1, description="share of the positions that is kept"
    )


class Discount(Params):
    """By place."""

    gamma: float = Field(
        default=0.8, gt=0, le=1, description="weight gamma^i of position i, from 0"
    )


class ByPosition(Params):
    """How many parts."""

    positions: PositiveInt = Field(
        description="D; a later position belongs to the last part: of a drafter, its depth",
        examples=[3],
    )


class JSD(Params):
    """The teacher's share of the mixture."""

    beta: float = Field(
        default=0.5, ge=0, le=1, description="teacher's share; 0 means forward KL, 1 reverse KL"
    )


class Skew(Params):
    """How much of the first distribution is mixed into the second."""

    alpha: float = Field(
        default=0.1, gt=0, lt=1, description="share mixed in; near 0 it is the plain KL"
    )


class AKL(Params):
    """Where the head of the teacher's distribution ends."""

    mass: float = Field(
        default=0.5, ge=0, le=1, description="the teacher's probability on the head"
    )


class TAID(Params):
    """How the target moves from the student to the teacher."""

    start: float = Field(default=0.4, ge=0, le=1, description="teacher's share at the start")
    end: float = Field(default=1.0, ge=0, le=1, description="teacher's share at the end")
    alpha: float = Field(
        default=5e-4,
        ge=0,
        le=1,
        description="how far a step may move the share; 0: with progress alone",
    )
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="of the mean of the loss's improvement"
    )
