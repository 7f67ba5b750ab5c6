"""Roughly what a run costs: to know whether it fits, and whether it takes minutes or days.

Memory is what is held at the peak of a training step on one device. Time is floating-point
operations over the throughput of a matrix product of the run's own shape, measured here and now;
it leaves out attention, padding, data loading and saving.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.benchmark import Timer

from kdcore.models import LoadedModel
from kdcore.specs import DistillSpec

ACTIVATIONS = 24
"""Numbers kept for the backward pass per position and unit of width, in each layer: about 8 for
attention and norms, and 4 for each of the four wide tensors of a gated MLP."""

LOGITS = 6
"""Copies of a chunk's logits: of both models, their log-probs, and the gradients on the way."""

DECODING = 0.25
"""Share of the throughput that generating reaches, whose products have few rows."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much there is to do.

    steps: optimiser steps. streams: backward passes of a step. tokens, learned: positions of a
    mean row, and how many of them reach the head. longest: positions of the longest row.
    heldout: rows that are measured. generated: tokens that the teacher answers beforehand.
    """

    steps: int
    streams: int
    tokens: float
    learned: float
    longest: int
    heldout: int
    generated: int


def memory(
    spec: DistillSpec, teacher: LoadedModel, student: LoadedModel, work: Work, buffers: int
) -> dict[str, int]:
    """What for -> bytes. buffers: how many momenta of all weights the policy keeps itself."""
    training, config = spec.training, student.model.config.get_text_config()
    trained = [p for p in student.model.parameters() if p.requires_grad]
    own = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    positions = training.batch_size * work.longest * config.num_hidden_layers
    itemsize = 2 if training.precision == "bf16" else trained[0].element_size()
    return {
        "teacher": bytes_of(teacher.model.parameters()),
        "student": bytes_of(student.model.parameters()),
        "gradients": bytes_of(trained) * (work.streams + 1 if work.streams > 1 else 1),
        "optimizer": bytes_of(trained) * own,
        "momentum policy": bytes_of(trained) * buffers,
        "activations": positions * config.hidden_size * ACTIVATIONS * itemsize,
        "logits of a chunk": training.chunk * student.classes * 4 * LOGITS,
    }


def seconds(
    spec: DistillSpec, teacher: LoadedModel, student: LoadedModel, work: Work
) -> dict[str, float]:
    """What for -> seconds."""
    training = spec.training
    speed = throughput(
        rows=min(1024, max(1, round(training.batch_size * work.tokens))),
        width=student.model.config.get_text_config().hidden_size,
        dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
    )
    theirs, ours = _forward(teacher.model, work), _forward(student.model, work)
    rows = work.steps * training.batch_size * training.accumulation
    measurements = 2 + (work.steps // training.eval_every if training.eval_every else 0)
    generating = 2 * sum(p.numel() for p in teacher.model.parameters()) * work.generated
    return {
        "responses": generating / (speed * DECODING),
        "training": rows * (theirs + ours * (1 + 2 * work.streams)) / speed,
        "measuring": measurements * work.heldout * (theirs + ours) / speed,
    }


def throughput(rows: int, width: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of [rows, width] x [width, 4 width] on this device."""
    device = PartialState().device
    product = Timer(
        "left @ right",
        globals={
            "left": torch.ones(rows, width, dtype=dtype, device=device),
            "right": torch.ones(width, 4 * width, dtype=dtype, device=device),
        },
        num_threads=torch.get_num_threads(),
    )
    seconds: list[float] = []
    until = time.monotonic() + 0.5
    while len(seconds) < 3 or time.monotonic() < until:
        seconds.append(product.timeit(1).median)
    return 8 * rows * width * width / min(seconds)  # others may be using the device just now


def _forward(model: Any, work: Work) -> float:
    """Operations of a forward pass over a mean row: two per weight and position."""
    embeddings = {id(m.weight): m.weight for m in _ends(model)}
    body = sum(p.numel() for p in model.parameters()) - sum(e.numel() for e in embeddings.values())
    head = model.get_output_embeddings()
    at_head = head.weight.numel() * work.learned if head is not None else 0.0
    return float(2 * (body * work.tokens + at_head))


def _ends(model: Any) -> list[Any]:
    """The input and output embeddings, which may share their weights."""
    return [
        m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    ]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
