"""The jobs that a spec file may ask for, and what carries each out: the one list of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, TypeAlias

from kdcore.bench_spec import BenchSpec
from kdcore.compare_spec import CompareSpec
from kdcore.data_specs import GenerateDataSpec
from kdcore.drafter_specs import TrainDrafterSpec
from kdcore.evaluate_spec import EvaluateSpec
from kdcore.specs import DistillSpec, SpecModel


@dataclass(frozen=True, slots=True)
class Job:
    """A kind of run.

    spec: its model. work: ``module:function`` that carries it out, and preflight: one that says
    what it would do, both imported when they are called, since they are heavy. A job that only
    measures has no preflight.
    """

    spec: type[SpecModel]
    work: str
    preflight: str | None = None

    def carry_out(self, spec: SpecModel, **options: Any) -> Any:
        """The `kdcore.runs.Run` that comes of it; of evaluate, which has no folder, its figures.

        options: registry, progress and, where there is a run folder, overwrite and resume.
        """
        return _attribute(self.work)(spec, **options)

    def look_ahead(self, spec: SpecModel, **options: Any) -> Any:
        """The report of its preflight. options: registry.

        Raises ValueError for a job that has none.
        """
        if self.preflight is None:
            raise ValueError(f"{self.work} has no preflight")
        return _attribute(self.preflight)(spec, **options)


def _attribute(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


JOBS = {
    "distill": Job(DistillSpec, "kdcore.distill:distill", "kdcore.preflight:preflight"),
    "compare": Job(CompareSpec, "kdcore.comparison:compare", "kdcore.preflight:preflight_arms"),
    "train-drafter": Job(
        TrainDrafterSpec,
        "kdcore.train_drafter:train_drafter",
        "kdcore.drafter_preflight:preflight_drafter",
    ),
    "bench": Job(BenchSpec, "kdcore.evaluation.bench:bench"),
    "evaluate": Job(EvaluateSpec, "kdcore.evaluate:evaluate"),
    "generate-data": Job(
        GenerateDataSpec,
        "kdcore.generate_data:generate_data",
        "kdcore.generate_data:preflight_generation",
    ),
}
"""What ``job:`` may say."""

TrainedSpec: TypeAlias = DistillSpec | TrainDrafterSpec
"""What a job that trains is told."""
