"""The model card of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdcore.evaluation.heldout import Metric
from kdcore.specs import DistillSpec


def model_card(
    spec: DistillSpec,
    before: Mapping[str, float],
    after: Mapping[str, float],
    metrics: Sequence[Metric],
    versions: Mapping[str, str],
) -> str:
    """Markdown with the metadata block that model hubs read."""
    method = spec.method.model_dump(mode="json")
    metadata = {"library_name": "transformers", "tags": ["distillation", "kdcore"]}
    asked: dict[str, Any] = {"method": method, "seed": spec.seed}
    rows = [
        f"| {metric.title} | {before[metric.name]:{metric.format}} "
        f"| {after[metric.name]:{metric.format}} |"
        for metric in metrics
        if metric.name in after
    ]
    table = ["| held-out | before | after |", "| --- | --- | --- |", *rows] if rows else []
    lines = [
        "---",
        yaml.safe_dump(metadata).strip(),
        "---",
        "# Distilled student",
        "",
        f"Teacher: `{spec.teacher.model}`. Student: `{spec.student.model}`"
        + (f", layers {spec.student.layers}" if spec.student.layers else "")
        + ". Trained with kdcore; `spec.yaml` beside this file repeats it.",
        "",
        "```yaml",
        yaml.safe_dump(asked, sort_keys=False).strip(),
        "```",
        "",
        *table,
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)
