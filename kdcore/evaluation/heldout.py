"""The metrics of a student on held-out rows, each defined once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.method.gating import gate_chunk
from kdcore.method.generators import one_generator_each
from kdcore.method.protocols import Gate, RankedGate
from kdcore.method.records import Batch, LogitBatch
from kdcore.models.device import widened
from kdcore.models.facts import not_finite
from kdcore.models.folder.config import MULTI_LABEL
from kdcore.models.loading.loaded import in_order
from kdcore.runs.progress import Progress
from kdcore.runs.results import Measured
from kdcore.training.views import StudentView

_NAN_OF = {"cross_entropy": "the measured model", "acceptance": "the teacher"}
"""Figures that are NaN only if a logit of these models is NaN or infinite, in this order."""
BEST = 5
"""Number of classes of ``top_5``."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows for measuring students.

    Attributes:
        rows: The rows.
        pad: Input -> padding value, see `kdcore.data.rows.collate`.
        batch_size: Rows per batch.
        chunk: Number of positions whose logits exist at a time.
        seed: The seed of random gates.
        progress: The display of the measurement.
    """

    rows: RowDataset
    pad: Mapping[str, int]
    batch_size: int
    chunk: int
    seed: int
    progress: Progress

    def measure(
        self,
        view: StudentView,
        model: Any,
        gates: Mapping[str, Gate | RankedGate],
    ) -> Measured:
        """Measure a model on the rows by `measure`, and restore its training mode.

        Args:
            view: The view of student and teacher.
            model: The student in its present state.
            gates: Label -> gate.

        Returns:
            The figures by row.
        """
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
                    yield batch_of(padded, model.device)
                    stage.advance()

            measured = measure(view, model, batches(), gates, self.chunk, self.seed)
        model.train(training)
        return measured


@torch.no_grad()
def measure(
    view: StudentView,
    model: Any,
    batches: Iterable[Batch],
    gates: Mapping[str, Gate | RankedGate],
    chunk: int,
    seed: int,
) -> Measured:
    """Sum each figure over the masked positions of each row.

    The figures are:

    - ``cross_entropy`` with the labels; perplexity is exp of its mean.
    - ``accuracy``: share of positions where the student's most likely class is the label.
    - ``f1``, of a classifier with any number of labels: 2 TP / (2 TP + FP + FN) over all labels of
      all rows; ``f1/LABEL`` is that of one label.
    - ``top_5``, of a classifier with more than five classes: share of positions where fewer than
      five classes have a larger logit than the label.

    With a live teacher also, over the classes that both have:

    - ``teacher_kl``: KL(teacher || student) at temperature 1, in nats per token.
    - ``agreement``: share of positions where both models have the same most likely class.
    - ``acceptance``: 1 - TV(teacher, student), the probability that speculative sampling accepts
      the student's sampled token.
    - ``gate/NAME``: weight of each gate that is neither ranked nor needs a reference model.

    Args:
        view: The view of student and teacher.
        model: The student in its present state, which ``view.student`` runs.
        batches: The batches of rows.
        gates: Label -> gate.
        chunk: Number of positions whose logits exist at a time.
        seed: The seed of random gates.

    Returns:
        The figures by row.

    Raises:
        UserError: A model gives NaN or infinite logits.
    """
    plain = {
        label: gate
        for label, gate in gates.items()
        if not isinstance(gate, RankedGate) and getattr(gate, "reference", None) is None
    }
    lengths: list[int] = []
    sums: dict[str, list[float]] = {}
    ratios: dict[str, tuple[list[int], list[int]]] = {}
    drawn = torch.Generator().manual_seed(seed)
    classifies = not model.can_generate()
    several = classifies and model.config.problem_type == MULTI_LABEL
    for batch in batches:
        ours, theirs = view.student(model, batch), view.teacher(batch)
        labels = batch.labels.flatten()[batch.positions]
        length = batch.mask.shape[1]
        row_of, places = batch.positions // length, batch.positions % length
        generators = one_generator_each(plain, drawn, labels.device)
        guesses = torch.empty_like(labels)
        weights = {label: torch.empty(len(labels), device=labels.device) for label in plain}
        of_rows: dict[str, Tensor] = {}
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            z_student = ours.logits(part)
            logp, guess = z_student.log_softmax(-1), z_student.argmax(-1)
            guesses[part] = guess
            figures = {
                "cross_entropy": F.nll_loss(logp, labels[part], reduction="none"),
                "accuracy": guess == labels[part],
            }
            if classifies and z_student.shape[-1] > BEST:
                of_label = z_student.gather(-1, labels[part, None])
                figures["top_5"] = (z_student > of_label).sum(-1) < BEST
            if theirs is not None:
                z_teacher = theirs.logits(part)
                shared = min(z_student.shape[-1], z_teacher.shape[-1])  # beyond it is padding
                if shared < z_student.shape[-1]:
                    z_student = z_student[:, :shared]
                    logp, guess = z_student.log_softmax(-1), z_student.argmax(-1)
                z_teacher = z_teacher[:, :shared]
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
                wide = widened(values)
                total = of_rows.setdefault(name, wide.new_zeros(len(batch.mask)))
                total.index_add_(0, row_of[part], wide)
        lengths += batch.mask.sum(1).tolist()
        if several:
            for name, of_batch in _f1(batch, guesses, in_order(model.config.id2label)).items():
                for column, added in zip(ratios.setdefault(name, ([], [])), of_batch, strict=True):
                    column += added
        for name, total in of_rows.items():
            added = total.tolist()
            sums.setdefault(name, []).extend(added)
            # a figure that a model's NaN reaches, and that excluded classes leave a number
            if name in _NAN_OF and any(map(math.isnan, added)):
                raise not_finite(_NAN_OF[name])
    return Measured(lengths, sums, ratios=ratios)


def _f1(
    batch: Batch, guesses: Tensor, names: Sequence[str]
) -> dict[str, tuple[list[int], list[int]]]:
    """The numerators and denominators of F1 in each row, of all labels and of each.

    Args:
        batch: The batch, whose positions are the labels of a row.
        guesses: [N] int64, whether each label is predicted, 0 or 1.
        names: The T labels.
    """
    shape = batch.mask.shape
    labels = batch.labels.flatten()[batch.positions]
    counts = []
    for each in (2 * guesses * labels, guesses + labels):
        whole = torch.zeros_like(batch.labels).flatten()
        whole[batch.positions] = each
        counts.append(whole.view(shape).cpu())
    hits, all_of = counts
    found = {"f1": (hits.sum(1).tolist(), all_of.sum(1).tolist())}
    for place, name in enumerate(names):
        found[f"f1/{name}"] = (hits[:, place].tolist(), all_of[:, place].tolist())
    return found
