"""Finished runs as the arms of a comparison, from the held-out rows that each of them stores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.reporting.run_record import RunRecord
from kdcore.runs.comparison_results import Arm, Comparison
from kdcore.runs.costs import spent
from kdcore.runs.folder import Run
from kdcore.runs.results import (
    HELDOUT_ROWS,
    Cost,
    Difference,
    Measured,
    TrainingResults,
    means_over,
)

_Seeds = Mapping[int, RunRecord]


def compared(runs: Sequence[RunRecord]) -> Comparison:
    """Compare finished runs on their held-out rows; the first one is the baseline.

    Runs whose specs differ only in ``run`` and ``seed`` are the seeds of one arm.

    Args:
        runs: Runs of the jobs that train, at least two.

    Returns:
        The comparison, with one arm for each method. An arm of several seeds has the name that its
        runs share without their seeds, another one that of its first run.

    Raises:
        UserError: A run has no held-out results, or the runs were measured on different rows or
            against different teachers.
    """
    results = {run.name: _results(run) for run in runs}
    specs = {run.name: Run(run.folder).spec() for run in runs}
    _refuse_others(runs, specs)
    arms = _arms(runs, specs)
    rows = {run.name: _rows(run) for run in runs}
    first, *_ = arms.values()
    metrics = {each.name: each for found in results.values() for each in found.metrics}
    return Comparison(
        baseline=next(iter(arms)),
        seeds=sorted({seed for arm in arms.values() for seed in arm}),
        metrics=list(metrics.values()),
        arms=[
            Arm(
                name,
                list(arm),
                figures=means_over([rows[run.name].means() for run in arm.values()]),
                cost=_cost(arm),
                differences=_differences(arm, first, rows),
            )
            for name, arm in arms.items()
        ],
        failures={},
        kept_by_these_rows=[
            name
            for name, arm in arms.items()
            if any(results[run.name].kept_by_these_rows for run in arm.values())
        ],
    )


def _results(run: RunRecord) -> TrainingResults:
    if run.results is None or not run.results.after:
        raise UserError(
            f"the run {run.name} has no held-out results; its status is '{run.status}'",
            "finish the run with resume=True, or leave it out",
        )
    return run.results


def _refuse_others(runs: Sequence[RunRecord], specs: Mapping[str, Any]) -> None:
    """Raises UserError for runs that were not measured alike."""
    first = runs[0]
    for other in runs[1:]:
        for what in ("heldout", "max_length"):
            if specs[first.name]["data"].get(what) != specs[other.name]["data"].get(what):
                raise UserError(
                    f"{first.name} and {other.name} differ in data.{what}, so their held-out rows "
                    "cannot be paired",
                    "measure the students on the same rows: kdcore evaluate RUN --data FILE",
                )
        for who in ("teacher", "target"):
            models = getattr(first.facts, who), getattr(other.facts, who)
            if all(models) and models[0].digest != models[1].digest:
                raise UserError(
                    f"{first.name} and {other.name} have different {who}s: {models[0].name} and "
                    f"{models[1].name}",
                    f"compare runs of one {who}",
                )


def _arms(runs: Sequence[RunRecord], specs: Mapping[str, Any]) -> dict[str, dict[int, RunRecord]]:
    """Arm -> seed -> run."""
    groups: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        spec = specs[run.name]
        method = json.dumps({n: v for n, v in spec.items() if n not in ("run", "seed")})
        seed = int(spec.get("seed", 0))
        while seed in groups.get(method, {}):  # the same run twice is two arms
            method += " again"
        groups.setdefault(method, {})[seed] = run
    arms = [*groups.values()]
    shared = [*map(_shared_name, arms)]
    if len(set(shared)) < len(arms):
        shared = [next(iter(arm.values())).name for arm in arms]
    return dict(zip(shared, arms, strict=True))


def _shared_name(arm: _Seeds) -> str:
    """The runs' name without their seeds, as of kd-0 and kd-1; else that of the first run."""
    first, *others = [run.name for run in arm.values()]
    named = {re.sub(rf"(?:seed|[-_/. ])*{seed}$", "", run.name) for seed, run in arm.items()}
    return named.pop() if others and len(named) == 1 and "" not in named else first


def _rows(run: RunRecord) -> Measured:
    rows = Run(run.folder).read(HELDOUT_ROWS)
    if rows is None or rows.after is None:
        raise UserError(
            f"{run.folder / HELDOUT_ROWS.name} does not contain the held-out rows of {run.name}",
            "run its spec again with overwrite=True, or leave it out",
        )
    return rows.after


def _differences(
    ours: _Seeds, theirs: _Seeds, rows: Mapping[str, Measured]
) -> dict[str, Difference]:
    """Differences over the shared seeds; without any, over the seeds in their order."""
    if ours is theirs:
        return {}
    shared = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    pairs = shared or [*zip(ours.values(), theirs.values(), strict=False)]
    try:
        return paired_differences(
            [rows[one.name] for one, _ in pairs], [rows[other.name] for _, other in pairs]
        )
    except ValueError:
        one, other = pairs[0]
        raise UserError(
            f"{one.name} and {other.name} were measured on different held-out rows",
            "measure the students on the same rows: kdcore evaluate RUN --data FILE",
        ) from None


def _cost(arm: _Seeds) -> Cost | None:
    costs = [run.cost or spent(run.steps) for run in arm.values()]
    known = [
        {name: value for name, value in asdict(cost).items() if value is not None}
        for cost in costs
        if cost
    ]
    return Cost(**means_over(known)) if len(known) == len(costs) else None
