"""The model card of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdcore.runs.results import Metric
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import origin_of
from kdcore.specs.train_drafter import TrainDrafterSpec

Figures = Mapping[str, float]


def model_card(
    spec: DistillSpec,
    before: Figures,
    after: Figures,
    metrics: Sequence[Metric],
    versions: Mapping[str, str],
    kept_by: str | None = None,
) -> str:
    """Write the card of a student.

    Args:
        spec: The spec of the run.
        before: Held-out figures before the training; empty if they were not measured.
        after: Held-out figures after the training.
        metrics: Title and format of the figures.
        versions: Package -> version.
        kept_by: The criterion that chose the best state, or None for the last state.

    Returns:
        Markdown with the metadata block that model hubs read.
    """
    layers = f", layers {spec.student.layers}" if spec.student.layers else ""
    made = f" from `{spec.student.config}`" if spec.student.config else ""
    distilled, teacher = spec.has_teacher, "No teacher."
    if spec.teachers:
        each = (f"{name} (`{origin_of(t)}`)" for name, t in spec.teachers.items())
        teacher = f"Teachers: {', '.join(each)}."
    elif distilled:
        name = f"`{spec.teacher.model}`" if spec.teacher else "cached log-probs only"
        name += " behind a server" if spec.served_teacher else ""
        teacher = f"Teacher: {name}."
    table = _table(before, after, metrics)
    if kept_by:
        table += ["", f"This student is the best evaluated state by {kept_by}."]
    return _card(
        {"library_name": "transformers", "tags": ["distillation", "kdcore"]},
        "Distilled student" if distilled else "Model trained on labels",
        f"{teacher} Student: `{spec.student.model}`{made}{layers}.",
        {"method": spec.method.model_dump(mode="json"), "seed": spec.seed},
        table,
        versions,
    )


def drafter_card(
    spec: TrainDrafterSpec,
    before: Figures,
    after: Figures,
    metrics: Sequence[Metric],
    versions: Mapping[str, str],
    kept_by: str | None = None,
) -> str:
    """Write the card of a drafter.

    Args:
        spec: The spec of the run.
        before: Held-out figures before the training; empty if they were not measured.
        after: Held-out figures after the training.
        metrics: Title and format of the figures.
        versions: Package -> version.
        kept_by: The criterion that chose the best checkpoint, or None for the last state.

    Returns:
        Markdown with the metadata block that model hubs read.
    """
    table = _table(before, after, metrics)
    if kept_by:
        table += ["", f"This drafter is the best checkpoint by {kept_by}."]
    return _card(
        {"library_name": "kdcore", "tags": ["speculative-decoding", "kdcore"]},
        "Speculative drafter",
        f"Target: `{spec.target.model}`; the drafter works with this target only.",
        {
            "drafter": spec.drafter.dump(),
            "method": spec.method.model_dump(mode="json"),
            "seed": spec.seed,
        },
        table,
        versions,
    )


def _card(
    metadata: Mapping[str, Any],
    title: str,
    of: str,
    asked: Mapping[str, Any],
    table: Sequence[str],
    versions: Mapping[str, str],
) -> str:
    lines = [
        "---",
        yaml.safe_dump(dict(metadata)).strip(),
        "---",
        f"# {title}",
        "",
        f"{of} Trained with kdcore; the run folder's `spec.yaml` repeats the training.",
        "",
        "```yaml",
        yaml.safe_dump(dict(asked), sort_keys=False).strip(),
        "```",
        "",
        *table,
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _table(before: Figures, after: Figures, metrics: Sequence[Metric]) -> list[str]:
    """The table of figures, with a column for each measurement; empty without measurements."""
    sides = {name: each for name, each in (("before", before), ("after", after)) if each}
    rows = [
        [metric.title, *(format(each[metric.name], metric.format) for each in sides.values())]
        for metric in metrics
        if metric.name in after
    ]
    lines = [["held-out", *sides], ["---"] * (len(sides) + 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []
