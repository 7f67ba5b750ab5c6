"""What a spec may set on each component. No torch here: declaring is free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcore import Params, Schedule

Momentum = Annotated[float, Field(ge=0, lt=1)]


class DKDParams(Params):
    """Free weights in place of the exact ones, after a warm-up."""

    alpha: float = Field(default=1.0, ge=0, description="weight of the part 'target'")
    beta: float = Field(default=8.0, ge=0, description="weight of the part 'non_target'")
    warmup: float = Field(
        default=20 / 240,
        ge=0,
        le=1,
        description="share of the training in which both weights rise from 0",
    )


SHARES: Schedule = [(0, 0.05), (1 / 3, 0.2), (2 / 3, 0.2), (1, 1)]
CLASSES: Schedule = [(0, 16), (1 / 3, 256), (2 / 3, 256), (1, 1e9)]


class CurriculumParams(Params):
    """How many of the teacher's best classes are kept as the training goes on.

    The default is the paper's: easy, transition, hard, from few classes to all of them. The
    borders at thirds and the middle value are ours; find the latter with constant ones.
    """

    unit: Literal["share", "classes"] = Field(
        default="share",
        description="what k counts: a share of all classes, straight in between (classifiers), or "
        "classes, straight in log k (vocabularies, whose best 5 % hold nearly all the mass)",
    )
    k: Schedule | None = Field(
        default=None,
        description="a number or [[progress, k], ...]; more classes than there are mean all. "
        "Default in thirds of the training: 5 % to 20 %, 20 %, 20 % to all, "
        "or 16 to 256, 256, 256 to all",
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> CurriculumParams:
        values = [value for _, value in self.points()]
        if self.unit == "share" and not all(0 < value <= 1 for value in values):
            raise ValueError(
                "a share of the classes must be above 0 and at most 1: write e.g. k: 0.2, or "
                "unit: classes where k counts classes"
            )
        if self.unit == "classes" and not all(value >= 1 for value in values):
            raise ValueError(
                "at least one class must be kept: write e.g. k: 16, or unit: share where k is a "
                "share of the classes"
            )
        return self

    def points(self) -> list[tuple[float, float]]:
        """(progress, k), the default filled in."""
        k = self.k if self.k is not None else {"share": SHARES, "classes": CLASSES}[self.unit]
        return k if isinstance(k, list) else [(0.0, k)]


class TopKMaskParams(CurriculumParams):
    """A curriculum, on a part of any name."""

    part: str = Field(default="non_target", description="the part whose classes are masked")


class MomentumParams(Params):
    """What all three policies have in common."""

    mu: Momentum = Field(default=0.9, description="base momentum (kernel adamw: base beta1)")
    kernel: Literal["sgd", "adamw"] = Field(
        default="sgd",
        description="sgd: heavy ball; adamw: one first moment per stream, and one second moment "
        "of the summed gradient",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="of every parameter; leave the optimiser's own at 0 then"
    )
    normalise_gain: bool = Field(
        default=False,
        description="kernel sgd: times (1 - mu_c) / (1 - mu), so that every stream's steady state "
        "is that of the base momentum",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of the summed gradient before any momentum; turn the trainer's "
        "clipping off then, for it would clip the update",
    )
    beta2: Momentum = Field(default=0.999, description="kernel adamw: of the second moment")
    eps: float = Field(
        default=1e-8, gt=0, description="kernel adamw: added to the second moment's root"
    )

    @model_validator(mode="after")
    def _gain_has_a_meaning(self) -> MomentumParams:
        if self.normalise_gain and self.kernel == "adamw":
            raise ValueError("kernel adamw averages, so its gain is always 1: drop normalise_gain")
        return self


class PerTermParams(MomentumParams):
    """A momentum for each term."""

    overrides: Mapping[str, Momentum] = Field(
        default={}, description="momentum of single terms: {name: mu}; 'task' is the cross-entropy"
    )


class DOTParams(MomentumParams):
    """Two momenta, mu - d and mu + d. A negative d swaps them."""

    d: float = Field(default=0.075, description="distance from the base momentum")

    @model_validator(mode="after")
    def _stays_a_momentum(self) -> DOTParams:
        if not (self.mu - abs(self.d) >= 0 and self.mu + abs(self.d) < 1):
            raise ValueError(
                "both mu - d and mu + d must be at least 0 and below 1: write a d nearer to 0, or "
                "another mu"
            )
        return self


class DeepKDParams(DOTParams):
    """DOT's momenta on three terms."""

    variant: Literal["equations", "released"] = Field(
        default="equations",
        description="released: as the published code does it, where the task shares the target's "
        "momentum, which alone takes the weight decay",
    )
