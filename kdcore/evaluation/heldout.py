"""How close a student is to its teacher on held-out rows: the one definition of each metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from kdcore.objective import Objective
from kdcore.protocols import RankedGate
from kdcore.records import Batch, LogitBatch
from kdcore.views import ModelView


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown. ``format`` is a format spec; ``better`` says which way is up."""

    name: str
    title: str
    format: str
    better: Literal["lower", "higher"]


METRICS = (
    Metric("teacher_kl", "teacher KL (nats/token)", ".3f", "lower"),
    Metric("perplexity", "perplexity", ".2f", "lower"),
    Metric("agreement", "top-1 agreement", ".1%", "higher"),
    Metric("acceptance", "acceptance rate", ".1%", "higher"),
    Metric("accuracy", "accuracy against the labels", ".1%", "higher"),
)


@torch.no_grad()
def measure(
    student: tuple[ModelView, Any],
    teacher: tuple[ModelView, Any],
    batches: Iterable[Batch],
    objective: Objective,
    chunk: int,
    seed: int,
) -> dict[str, float]:
    """Means over all masked positions of all batches.

    teacher_kl: KL(teacher || student) at temperature 1, nats per token.
    perplexity: exp of the mean cross-entropy with the labels.
    agreement: share of positions where both models' most likely class is the same.
    acceptance: 1 - TV(teacher, student), the probability that speculative sampling accepts the
        student's sampled token.
    accuracy: share of positions where the student's most likely class is the label.
    gate/NAME: mean weight of each of the method's own gates that judges a position by itself.
    """
    plain = {k: g for k, g in objective.gates.items() if not isinstance(g, RankedGate)}
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        ours = student[0](student[1], batch)
        theirs = teacher[0](teacher[1], batch)
        labels = batch.labels[batch.mask]
        generator = torch.Generator(labels.device).manual_seed(seed)
        count += len(labels)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            z_student = ours.logits(ours.linear(part))
            z_teacher = theirs.logits(theirs.linear(part))
            logp, teacher_logp = z_student.log_softmax(-1), z_teacher.log_softmax(-1)
            figures = {
                "teacher_kl": F.kl_div(logp, teacher_logp, reduction="none", log_target=True).sum(),
                "cross_entropy": F.nll_loss(logp, labels[part], reduction="sum"),
                "agreement": (z_student.argmax(-1) == z_teacher.argmax(-1)).sum(),
                "accuracy": (z_student.argmax(-1) == labels[part]).sum(),
                "acceptance": torch.minimum(logp, teacher_logp).exp().sum(),
            }
            logits = LogitBatch(
                z_student[None],
                z_teacher[None],
                labels[None, part],
                torch.ones_like(labels[None, part], dtype=torch.bool),
                1.0,
                generator,
            )
            figures |= {f"gate/{label}": gate(logits).sum() for label, gate in plain.items()}
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    means = {name: value / max(count, 1) for name, value in sums.items()}
    means["perplexity"] = math.exp(min(means.pop("cross_entropy"), 700.0))
    return means
