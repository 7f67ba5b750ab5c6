"""Parameters of the components. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcore import Params, Schedule
from kdcore.specs.parts.fields import NonNegative, Positive

Momentum = Annotated[float, Field(ge=0, lt=1)]


class DKDParams(Params):
    """Parameters of the dkd splitter: free weights instead of the exact ones, after a warm-up."""

    alpha: NonNegative = Field(default=1.0, description="weight of the part 'target'")
    beta: NonNegative = Field(default=8.0, description="weight of the part 'non_target'")
    warmup: float = Field(
        default=20 / 240,
        ge=0,
        le=1,
        description="share of the training in which both weights rise from 0",
    )


SHARES: Schedule = [(0, 0.05), (1 / 3, 0.2), (2 / 3, 0.2), (1, 1)]
CLASSES: Schedule = [(0, 16), (1 / 3, 256), (2 / 3, 256), (1, 1e9)]


class CurriculumParams(Params):
    """Schedule of the number of top teacher classes that are kept.

    The default is the paper's: easy, transition and hard phases, from few classes to all. The
    phases of a third each and the middle value are kdcore's; tune the latter with a constant k.
    """

    unit: Literal["share", "classes"] = Field(
        default="share",
        description="unit of k: a share of all classes, interpolated linearly (for classifiers), "
        "or a number of classes, interpolated in log k (for vocabularies, whose top 5 % of "
        "classes have nearly all the mass)",
    )
    k: Schedule | None = Field(
        default=None,
        description="number of classes to keep, or [[progress, k], ...]; a k above the number of "
        "classes means all (default: in thirds of the training, 5 % to 20 %, 20 %, 20 % to all, "
        "or 16 to 256, 256, 256 to all)",
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> CurriculumParams:
        values = [value for _, value in self.points()]
        if self.unit == "share" and not all(0 < value <= 1 for value in values):
            raise ValueError(
                "k must be a share above 0 and at most 1: write e.g. k: 0.2, or unit: classes if k "
                "is a number of classes"
            )
        if self.unit == "classes" and not all(value >= 1 for value in values):
            raise ValueError(
                "k must be at least 1: write e.g. k: 16, or unit: share if k is a share of the "
                "classes"
            )
        return self

    def points(self) -> list[tuple[float, float]]:
        """Return the schedule of k, or its default.

        Returns:
            Pairs of progress and k.
        """
        k = self.k if self.k is not None else {"share": SHARES, "classes": CLASSES}[self.unit]
        return k if isinstance(k, list) else [(0.0, k)]


class TopKMaskParams(CurriculumParams):
    """Parameters of the top_k_mask splitter."""

    part: str = Field(default="non_target", description="name of the part to mask")


class MomentumParams(Params):
    """Parameters that all three momentum policies share."""

    mu: Momentum = Field(default=0.9, description="base momentum (kernel adamw: base beta1)")
    kernel: Literal["sgd", "adamw"] = Field(
        default="sgd",
        description="update rule: sgd is heavy ball; adamw has a first moment for each stream and "
        "one second moment of the summed gradient",
    )
    weight_decay: NonNegative = Field(
        default=0.0,
        description="weight decay of every parameter; set the optimizer's weight decay to 0",
    )
    normalise_gain: bool = Field(
        default=False,
        description="normalisation of each stream by (1 - mu_c) / (1 - mu), which gives every "
        "stream the steady state of the base momentum; kernel sgd only",
    )
    clip: Positive | None = Field(
        default=None,
        description="maximum norm of the summed gradient before any momentum; set training.clip to "
        "0, since it would clip the update (default: no clipping)",
    )
    beta2: Momentum = Field(
        default=0.999, description="decay of the second moment; kernel adamw only"
    )
    eps: Positive = Field(
        default=1e-8, description="term added to the second moment's root; kernel adamw only"
    )

    @model_validator(mode="after")
    def _gain_has_a_meaning(self) -> MomentumParams:
        if self.normalise_gain and self.kernel == "adamw":
            raise ValueError(
                "kernel adamw does not support normalise_gain, since its gain is always 1: remove "
                "normalise_gain"
            )
        return self


class PerTermParams(MomentumParams):
    """Parameters of the per_term momentum policy."""

    overrides: Mapping[str, Momentum] = Field(
        default={},
        description="momentum of individual terms: {name: mu}; 'task' is the cross-entropy",
    )


class DOTParams(MomentumParams):
    """Parameters of the dot momentum policy: two momenta, mu - d and mu + d."""

    d: Annotated[float, Field(gt=-1, lt=1)] = Field(
        default=0.075,
        description="difference from the base momentum; a negative value swaps the momenta",
    )
    variant: Literal["equations", "released"] = Field(
        default="equations",
        description="source of the weight decay's rule: equations applies it at the base momentum; "
        "released applies it in the task's buffer, as the authors' code does",
    )

    def momenta(self) -> dict[str, float]:
        """Return the momentum of each term that the policy names."""
        return {"task": self.mu - self.d, "kd": self.mu + self.d}

    @model_validator(mode="after")
    def _stays_a_momentum(self) -> DOTParams:
        wrong = {term: mu for term, mu in self.momenta().items() if not 0 <= mu < 1}
        for term, mu in wrong.items():
            raise ValueError(
                f"the momentum of '{term}' would be {mu:g}, but must be at least 0 and below 1: "
                "write a difference closer to 0, or another mu"
            )
        return self


class DeepKDParams(DOTParams):
    """Parameters of the deepkd momentum policy: momenta of three terms."""

    d_target: Annotated[float, Field(gt=-1, lt=1)] | None = Field(
        default=None, description="difference mu - mu_target of the target's momentum (default: d)"
    )
    d_non_target: Annotated[float, Field(gt=-1, lt=1)] | None = Field(
        default=None,
        description="difference mu_non_target - mu of non_target's momentum (default: d)",
    )
    variant: Literal["equations", "released"] = Field(
        default="equations",
        description="source of the rule: the paper's equations, or its released code, where the "
        "task shares the target's momentum and only that buffer takes the weight decay",
    )

    def momenta(self) -> dict[str, float]:
        """Return the momentum of each term that the policy names."""
        below = self.d if self.d_target is None else self.d_target
        above = self.d if self.d_non_target is None else self.d_non_target
        target, non_target = self.mu - below, self.mu + above
        task = target if self.variant == "released" else self.mu + self.d
        return {"task": task, "target": target, "non_target": non_target}
