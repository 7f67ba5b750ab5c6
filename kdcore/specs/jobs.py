"""kdcore's own jobs, declared through the hook ``kdcore_jobs`` like those of a plugin.

`kdcore.components.registry.Registry.jobs` lists all jobs. An entry point of kdcore names this
module, so it must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdcore.components.hookspecs import hookimpl
from kdcore.components.job import Job

_DECLARED = (
    Job(
        name="distill",
        summary="Distil a student from a teacher.",
        about="""\
The run folder then contains the student (a plain transformers model), the metrics and a model
card.

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
        summary="Train a drafter for speculative decoding.",
        about="""\
The run folder then contains the drafter with the best held-out acceptance length, the metrics
and a model card.

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
        summary="Train with several methods and seeds, and compare them.",
        about="""\
The table shows the cost of each arm and its difference from the baseline, with a 95 % confidence
interval over the held-out rows and the seeds. The run folder then contains comparison.json and
comparison.html, which shows every metric.

For example:

kdcore compare compare.yaml

kdcore compare compare.yaml --set controls=true --resume

kdcore compare compare.yaml --on ray

kdcore compare compare.yaml --share 1/4
""",
        model="kdcore.specs.compare:CompareSpec",
        work="kdcore.jobs.comparison.compare:compare",
        preflight="kdcore.jobs.preflight.comparison:preflight_arms",
        template="kdcore.jobs:starters/compare.yaml",
        result="comparison.json",
        spreads=True,
        shares=True,
    ),
    Job(
        name="bench",
        summary="Measure the decoding speed of several methods side by side.",
        about="""\
Running servers (servers in the spec) are measured beside kdcore's own loop. The run folder then
contains bench.json, bench.html and every measurement.

For example:

kdcore bench bench.yaml

kdcore bench bench.yaml --set limit=4 --out runs/quick
""",
        model="kdcore.specs.bench:BenchSpec",
        work="kdcore.jobs.bench:bench",
        preflight="kdcore.jobs.preflight.bench:preflight_bench",
        template="kdcore.jobs:starters/bench.yaml",
        result="bench.json",
    ),
    Job(
        name="generate-data",
        summary="Generate a teacher's responses to prompts.",
        about="""\
The teacher is a local model or a model behind an endpoint. The run folder then contains
responses.jsonl, which the chat source reads.

For example:

kdcore generate-data generate-data.yaml

kdcore generate-data generate-data.yaml --resume

kdcore generate-data generate-data.yaml --on ray
""",
        model="kdcore.specs.generate_data:GenerateDataSpec",
        work="kdcore.jobs.generate_data:generate_data",
        preflight="kdcore.jobs.preflight.generate_data:preflight_generation",
        template="kdcore.jobs:starters/generate-data.yaml",
        result="run.json",
        spreads=True,
    ),
    Job(
        name="evaluate",
        summary="Show the results of a run, or evaluate a model.",
        about="""\
The folder of a run without further options shows the results of the run. With further options,
the command evaluates the run's student on the run's held-out rows against the run's teacher;
--data and --teacher replace these.

Several finished runs are compared with the first one, with intervals from their stored rows.

For example:

kdcore evaluate runs/distill

kdcore evaluate runs/kd runs/speckd --table latex

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
"""kdcore's own jobs by name."""


@hookimpl
def kdcore_jobs() -> Iterable[Job]:
    """Declare kdcore's own jobs."""
    return JOBS.values()
