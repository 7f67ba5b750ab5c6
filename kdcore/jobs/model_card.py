"""The model card of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdcore.runs.results import Metric
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import TrainDrafterSpec

Figures = Mapping[str, float]


def model_card(
    spec: DistillSpec,
    before: Figures,
    after: Figures,
    metrics: Sequence[Metric],
    versions: Mapping[str, str],
) -> str:
    """Of a student: Markdown with the metadata block that model hubs read."""
    layers = f", layers {spec.student.layers}" if spec.student.layers else ""
    made = f" from `{spec.student.config}`" if spec.student.config else ""
    distilled, teacher = spec.teacher or spec.data.teacher_cache, "No teacher."
    if distilled:
        name = f"`{spec.teacher.model}`" if spec.teacher else "known by its cached log-probs alone"
        teacher = f"Teacher: {name}."
    return _card(
        {"library_name": "transformers", "tags": ["distillation", "kdcore"]},
        "Distilled student" if distilled else "Model trained on labels",
        f"{teacher} Student: `{spec.student.model}`{made}{layers}.",
        {"method": spec.method.model_dump(mode="json"), "seed": spec.seed},
        _table(before, after, metrics),
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
    """Of a drafter. kept_by: what it is the best of its checkpoints by, if it is."""
    table = _table(before, after, metrics)
    if kept_by:
        table += ["", f"Of its checkpoints this is the best by {kept_by}."]
    return _card(
        {"library_name": "kdcore", "tags": ["speculative-decoding", "kdcore"]},
        "Speculative drafter",
        f"Drafts for `{spec.target.model}`, and for no other target.",
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
        f"{of} Trained with kdcore; `spec.yaml` beside this file repeats it.",
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
    """A column for each time that something was measured; nothing where nothing ever was."""
    sides = {name: each for name, each in (("before", before), ("after", after)) if each}
    rows = [
        [metric.title, *(format(each[metric.name], metric.format) for each in sides.values())]
        for metric in metrics
        if metric.name in after
    ]
    lines = [["held-out", *sides], ["---"] * (len(sides) + 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []
