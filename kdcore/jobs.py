"""The jobs that a spec file may ask for."""

from __future__ import annotations

from typing import TypeAlias

from kdcore.drafter_specs import TrainDrafterSpec
from kdcore.specs import CompareSpec, DistillSpec, SpecModel

JOBS: dict[str, type[SpecModel]] = {
    "distill": DistillSpec,
    "compare": CompareSpec,
    "train-drafter": TrainDrafterSpec,
}
"""What ``job:`` may say."""

TrainedSpec: TypeAlias = DistillSpec | TrainDrafterSpec
"""What a job that trains is told."""
