"""Components as a spec names them, and what the tests of the plugins feed them with."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from kdcore.components.choice import Choice, OfKind
from kdcore.components.registry import installed
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.objective import Objective
from kdcore.method.protocols import RankedGate
from kdcore.method.records import Batch, LogitBatch
from kdcore.models.assembly import Assembly


def build(kind: str, name: str, **params: Any) -> Any:
    """A component, as a spec that says ``{name: ..., its parameters}`` gets it."""
    chosen = TypeAdapter(Annotated[Choice, OfKind(kind)]).validate_python({"name": name, **params})
    return Assembly(installed()).build(chosen)


def random_logits(
    seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def logit_batch(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, seed: int = 0
) -> LogitBatch:
    """The record, from logits [B, T, V]; everything is masked in unless told."""
    whole = torch.ones(student.shape[:2], dtype=torch.bool)
    return LogitBatch(
        student,
        teacher,
        torch.zeros(student.shape[:2], dtype=torch.int64),
        whole if mask is None else mask,
        0.5,
        torch.Generator().manual_seed(seed),
        torch.arange(student.shape[1]).expand(student.shape[:2]),
    )


def random_batch(
    seed: int, rows: int = 2, positions: int = 5, classes: int = 11, **rest: Any
) -> LogitBatch:
    """Student and teacher drawn on their own; ``rest``: of `random_logits`."""
    shape = (rows, positions, classes)
    student, teacher = (random_logits(2 * seed + i, *shape, **rest) for i in (0, 1))
    return logit_batch(student, teacher, seed=seed)


@torch.no_grad()
def weights_of(gate: Any, batch: LogitBatch) -> Tensor:
    """The gate's weights [B, T]; a ranked one ranks the masked positions, the others get 0."""
    if not isinstance(gate, RankedGate):
        return gate(batch)
    weights = torch.zeros(batch.mask.shape, dtype=batch.student.dtype)
    rows = (
        batch.mask.sum(1).tolist() if getattr(gate, "within_rows", False) else int(batch.mask.sum())
    )
    scores = gate.score(batch)[batch.mask].split(rows)
    weights[batch.mask] = torch.cat([gate.weigh(each, batch.progress) for each in scores])
    return weights


def train_step(
    batch: LogitBatch,
    *gates: Any,
    divergence: Any = None,
    chunk: int = 512,
    pad: int = 0,
    normalize: str = "sequence",
) -> tuple[StepLoss, Tensor]:
    """What the loss engine makes of a batch, and its gradient at the student's logits [B, T, V].

    pad: positions to add to each row, outside the mask. The rest: of `Objective`, `LossEngine`.
    """

    def padded(tensor: Tensor) -> Tensor:
        extra = torch.zeros(tensor.shape[0], pad, *tensor.shape[2:], dtype=tensor.dtype)
        return torch.cat([tensor, extra], 1)

    mask = padded(batch.mask)
    student = padded(batch.student).requires_grad_()
    classes = student.shape[-1]
    objective = Objective(
        gates={f"gate{i}": gate for i, gate in enumerate(gates)},
        splitters=(),
        divergence=divergence or build("divergence", "forward_kl"),
        weights={"kd": 1.0},
        normalize=normalize,
    )
    third = batch.reference
    reference = None if third is None else HiddenLogits(padded(third)[mask], Head(), classes)
    step = LossEngine(objective, {"all": ("kd",)}, chunk)(
        HiddenLogits(student[mask], Head(), classes),
        HiddenLogits(padded(batch.teacher)[mask], Head(), classes),
        Batch({}, padded(batch.labels), mask, torch.arange(len(mask))),
        whole=float(mask.any(1).sum()),
        progress=batch.progress,
        generator=torch.Generator().manual_seed(7),
        reference=reference,
    )
    (gradient,) = torch.autograd.grad(step.losses["all"], student)
    return step, gradient[:, : batch.mask.shape[1]]
