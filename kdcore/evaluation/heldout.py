"""How close a student is to its teacher on held-out rows: the one definition of each metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from kdcore.data.collate import RowDataset, batch_of, collate
from kdcore.loss_engine import gate_chunk, one_generator_each
from kdcore.progress import Progress
from kdcore.protocols import Gate, RankedGate
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
    Metric("rouge_l", "ROUGE-L of the answers", ".3f", "higher"),
    Metric("exact_match", "exact match of the answers", ".1%", "higher"),
)


def shown(figures: Mapping[str, float]) -> list[dict[str, str]]:
    """The metrics that are among some figures, as plain data, in the order of `METRICS`."""
    return [asdict(metric) for metric in METRICS if metric.name in figures]


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of R held-out rows, and of the answers to R' prompts.

    lengths: learned positions of each row. sums: figure -> its sum over each row's positions.
    scores: figure -> its value for each answer. ratios: figure -> for each row, what is divided,
    and by what.
    Kept by row, so that two models can be compared row by row.
    """

    lengths: list[int]
    sums: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def columns(self) -> dict[str, tuple[Sequence[float], Sequence[int]]]:
        """Figure -> its sum for each row (or answer), and what that is divided by."""
        return {
            **{name: (values, self.lengths) for name, values in self.sums.items()},
            **{name: (each, [1] * len(each)) for name, each in self.scores.items()},
            **self.ratios,
        }

    def means(self) -> dict[str, float]:
        """Means over all positions of all rows, or over the answers; ratios of sums over rows.

        perplexity is exp of the mean cross-entropy.
        """
        means = {
            name: sum(values) / max(sum(counts), 1)
            for name, (values, counts) in self.columns().items()
        }
        if "cross_entropy" in means:
            means["perplexity"] = math.exp(min(means.pop("cross_entropy"), 700.0))
        return means


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows to measure models on.

    pad: see `kdcore.data.collate.collate`. batch_size: rows at once; chunk: positions whose logits
    exist at once. seed: of gates that draw.
    """

    rows: RowDataset
    pad: Mapping[str, int]
    batch_size: int
    chunk: int
    seed: int
    progress: Progress

    def measure(
        self,
        student: tuple[ModelView, Any],
        teacher: tuple[ModelView, Any] | None,
        gates: Mapping[str, Gate | RankedGate],
    ) -> Measured:
        """`measure` over the rows, on the student's device; the student's mode is put back."""
        model = student[1]
        loader: DataLoader[Any] = DataLoader(
            self.rows,
            self.batch_size,
            collate_fn=lambda rows: collate(rows, self.pad),
        )
        training = model.training
        model.eval()
        with self.progress.stage("measure held-out rows", len(loader)) as stage:

            def batches() -> Iterator[Batch]:
                for padded in loader:
                    yield batch_of({name: each.to(model.device) for name, each in padded.items()})
                    stage.advance()

            measured = measure(student, teacher, batches(), gates, self.chunk, self.seed)
        model.train(training)
        return measured


@torch.no_grad()
def measure(
    student: tuple[ModelView, Any],
    teacher: tuple[ModelView, Any] | None,
    batches: Iterable[Batch],
    gates: Mapping[str, Gate | RankedGate],
    chunk: int,
    seed: int,
) -> Measured:
    """Every figure at every masked position of all batches, summed by row.

    cross_entropy: with the labels; perplexity is exp of its mean.
    accuracy: share of positions where the student's most likely class is the label.

    And beside a teacher:

    teacher_kl: KL(teacher || student) at temperature 1, nats per token.
    agreement: share of positions where both models' most likely class is the same.
    acceptance: 1 - TV(teacher, student), the probability that speculative sampling accepts the
        student's sampled token.
    gate/NAME: weight of each of the gates that judges a position by itself, and by no third model.
    """
    plain = {
        label: gate
        for label, gate in gates.items()
        if not isinstance(gate, RankedGate) and getattr(gate, "reference", None) is None
    }
    lengths: list[int] = []
    sums: dict[str, list[float]] = {}
    drawn = torch.Generator(student[1].device).manual_seed(seed)
    for batch in batches:
        ours = student[0](student[1], batch)
        theirs = teacher[0](teacher[1], batch) if teacher else None
        labels = batch.labels[batch.mask]
        row_of, places = batch.mask.nonzero(as_tuple=True)
        generators = one_generator_each(plain, drawn)
        weights = {label: torch.empty(len(labels), device=labels.device) for label in plain}
        of_rows: dict[str, Tensor] = {}
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            z_student = ours.logits(ours.linear(part))
            logp, guess = z_student.log_softmax(-1), z_student.argmax(-1)
            figures = {
                "cross_entropy": F.nll_loss(logp, labels[part], reduction="none"),
                "accuracy": guess == labels[part],
            }
            if theirs is not None:
                z_teacher = theirs.logits(theirs.linear(part))
                teacher_logp = z_teacher.log_softmax(-1)
                kl = F.kl_div(logp, teacher_logp, reduction="none", log_target=True)
                figures |= {
                    "teacher_kl": kl.sum(-1),
                    "agreement": guess == z_teacher.argmax(-1),
                    "acceptance": torch.minimum(logp, teacher_logp).exp().sum(-1),
                }
                logits = LogitBatch(
                    z_student[None],
                    z_teacher[None],
                    labels[None, part],
                    torch.ones_like(labels[None, part], dtype=torch.bool),
                    1.0,
                    drawn,
                    places[None, part],
                )
                gate_chunk(plain, logits, part, weights, generators)
                figures |= {f"gate/{label}": weights[label][part] for label in plain}
            for name, values in figures.items():
                total = of_rows.setdefault(
                    name, values.new_zeros(len(batch.mask), dtype=torch.double)
                )
                total.index_add_(0, row_of[part], values.double())
        lengths += batch.mask.sum(1).tolist()
        for name, total in of_rows.items():
            sums.setdefault(name, []).extend(total.tolist())
    return Measured(lengths, sums)
