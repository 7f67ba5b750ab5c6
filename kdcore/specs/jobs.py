"""kdcore's own jobs, declared as a plugin declares its own: through the hook ``kdcore_jobs``.

The table of all jobs is the registry's: `kdcore.method.registry.Registry.jobs`. This module is
named by an entry point of kdcore's, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdcore.method.hookspecs import hookimpl
from kdcore.method.job import Job

_DECLARED = (
    Job(
        name="distill",
        summary="Train a student from a teacher.",
        about="""\
The run folder then holds the student (plain transformers), the metrics and a model card.

For example:

kdcore distill spec.yaml

kdcore distill spec.yaml --set training.steps=50 --out runs/short

kdcore distill spec.yaml --resume
""",
        model="kdcore.specs.distill:DistillSpec",
        work="kdcore.jobs.distill:distill",
        preflight="kdcore.jobs.preflight.distill:preflight",
        template="kdcore.jobs:starters/distill.yaml",
        result="results.json",
        comparable=True,
    ),
    Job(
        name="train-drafter",
        summary="Train a drafter, to decode faster with the same output.",
        about="""\
The run folder then holds the drafter that did best on the held-out rows, the metrics and a
model card.

For example:

kdcore train-drafter drafter.yaml

kdcore train-drafter drafter.yaml --set training.steps=50 --out runs/short
""",
        model="kdcore.specs.train_drafter:TrainDrafterSpec",
        work="kdcore.jobs.train_drafter:train_drafter",
        preflight="kdcore.jobs.preflight.train_drafter:preflight_drafter",
        template="kdcore.jobs:starters/train-drafter.yaml",
        result="results.json",
        comparable=True,
    ),
    Job(
        name="compare",
        summary="Train by several methods and seeds, and compare them.",
        about="""\
Each difference from the baseline comes with a 95 % interval over the held-out rows and the
seeds, and each arm with what it cost. The run folder then holds comparison.json, and
comparison.html with every figure.

For example:

kdcore compare compare.yaml

kdcore compare compare.yaml --set controls=true --resume
""",
        model="kdcore.specs.compare:CompareSpec",
        work="kdcore.jobs.compare:compare",
        preflight="kdcore.jobs.preflight.distill:preflight_arms",
        template="kdcore.jobs:starters/compare.yaml",
        result="comparison.json",
    ),
    Job(
        name="bench",
        summary="Decode by several methods side by side, for their speed.",
        about="""\
The run folder then holds bench.json, bench.html, and every measurement.

For example:

kdcore bench bench.yaml

kdcore bench bench.yaml --set limit=4 --out runs/quick
""",
        model="kdcore.specs.bench:BenchSpec",
        work="kdcore.jobs.bench:bench",
        template="kdcore.jobs:starters/bench.yaml",
        result="bench.json",
    ),
    Job(
        name="generate-data",
        summary="Let a teacher, here or behind an endpoint, answer prompts.",
        about="""\
The run folder then holds responses.jsonl, which the chat source reads.

For example:

kdcore generate-data generate-data.yaml

kdcore generate-data generate-data.yaml --resume
""",
        model="kdcore.specs.generate_data:GenerateDataSpec",
        work="kdcore.jobs.generate_data:generate_data",
        preflight="kdcore.jobs.preflight.generate_data:preflight_generation",
        template="kdcore.jobs:starters/generate-data.yaml",
        result="run.json",
    ),
    Job(
        name="evaluate",
        summary="Show the results of a run again, or measure a model.",
        about="""\
A run alone shows what was measured. With any other option its student is measured: on the
run's own held-out rows beside its own teacher, unless --data and --teacher say otherwise.

For example:

kdcore evaluate runs/distill

kdcore evaluate runs/distill --answers rouge_l

kdcore evaluate some/model.gguf --data heldout.jsonl --teacher some/teacher
""",
        model="kdcore.specs.evaluate:EvaluateSpec",
        work="kdcore.jobs.evaluate:evaluate",
        template="kdcore.jobs:starters/evaluate.yaml",
        run_folder=False,
    ),
)

JOBS = {job.name: job for job in _DECLARED}
"""kdcore's own jobs by their names."""


@hookimpl
def kdcore_jobs() -> Iterable[Job]:
    """Declare them."""
    return JOBS.values()
