"""The jobs that a spec file may ask for, and what carries each out: the one list of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from kdcore.specs.bench import BenchSpec
from kdcore.specs.compare import CompareSpec
from kdcore.specs.distill import DistillSpec
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.fields import SpecModel
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.train_drafter import TrainDrafterSpec


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
        """Run it; returns its `kdcore.runs.folder.Run`, or of evaluate the figures.

        options: registry, progress and, where there is a run folder, overwrite and resume.
        """
        return _attribute(self.work)(spec, **options)

    def look_ahead(self, spec: SpecModel, **options: Any) -> Any:
        """The report of its preflight. options: registry.

        Raises ValueError for a job that has none.
        """
        if self.preflight is None:
            raise ValueError(f"{self.work} has no preflight check")
        return _attribute(self.preflight)(spec, **options)


def _attribute(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


JOBS = {
    "distill": Job(
        DistillSpec, "kdcore.jobs.distill:distill", "kdcore.jobs.preflight.distill:preflight"
    ),
    "compare": Job(
        CompareSpec, "kdcore.jobs.compare:compare", "kdcore.jobs.preflight.distill:preflight_arms"
    ),
    "train-drafter": Job(
        TrainDrafterSpec,
        "kdcore.jobs.train_drafter:train_drafter",
        "kdcore.jobs.preflight.train_drafter:preflight_drafter",
    ),
    "bench": Job(BenchSpec, "kdcore.jobs.bench:bench"),
    "evaluate": Job(EvaluateSpec, "kdcore.jobs.evaluate:evaluate"),
    "generate-data": Job(
        GenerateDataSpec,
        "kdcore.jobs.generate_data:generate_data",
        "kdcore.jobs.preflight.generate_data:preflight_generation",
    ),
}
"""What ``job:`` may say."""
