"""Rough estimates of a run's memory and time: whether it fits, and takes minutes or days.

Memory is the peak of a training step on one device. Time is the number of floating-point
operations divided by the throughput of a small network of the run's own shape and precision,
measured on this device; it leaves out attention, padding, the optimizer, data loading and saving.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kdcore.errors import UserError
from kdcore.models.device import LOGITS, chunk_on, process_device
from kdcore.models.facts import describe_model
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.matching.layers import reads_attention
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import TrainingSpec
from kdcore.training.trainer.matching import sizes_of

ACTIVATIONS = 24
"""Numbers kept for the backward pass per position and unit of width, in each layer: about 8 for
attention and norms, and 4 for each of the four wide tensors of a gated MLP."""

MAPS = 4
"""Copies of an attention map that exist while its distance and its gradient are computed."""
DECODING = 0.25
"""Share of the throughput that generation reaches: its matrix products have few rows."""
WIDTH = 256
"""Width of the network that is timed for a model whose config does not say its own."""


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of work of a run.

    Attributes:
        steps: Optimizer steps.
        streams: Backward passes per step.
        terms: Terms of the loss.
        tokens: Positions of a mean row or, of packed rows, of a mean sequence.
        learned: Learned positions of it, which reach the head.
        longest: Positions of the longest row or sequence.
        heldout: Held-out rows; as many sequences of them if the training rows are packed.
        answered: Tokens that the student generates whenever the held-out rows are measured.
        generated: Tokens that the teacher generates before the training.
        sampled: Tokens that the student samples during the training.
        inputs: Name -> input tensor of one row, without the batch dimension.
        beside: Positions of auxiliary rows for each position of a training row.
    """

    steps: int
    streams: int
    terms: int
    tokens: float
    learned: float
    longest: int
    heldout: int
    answered: int
    generated: int
    sampled: float
    inputs: Mapping[str, torch.Tensor]
    beside: float = 0.0


def memory(
    spec: DistillSpec,
    models: TeacherAndStudent,
    work: Work,
    buffers: int,
    matchers: Iterable[Any] = (),
) -> dict[str, int]:
    """Estimate the memory of a training step.

    Args:
        spec: The distill spec.
        models: The models, which need no weights.
        work: The amount of work.
        buffers: Copies of the trained weights that the momentum policy keeps.
        matchers: The bound matchers, which are trained with the student.

    Returns:
        Purpose -> bytes.
    """
    training, student, matchers = spec.training, models.student, list(matchers)
    own = [p for matcher in matchers for p in matcher.parameters()]
    trained = [*(p for p in student.model.parameters() if p.requires_grad), *own]
    itemsize = 2 if training.precision == "bf16" else trained[0].element_size()
    weights = {name: loaded.weight_bytes for name, loaded in models.named.items()}
    return {
        **weights,
        **of_trained(training, bytes_of(trained), work.streams, work.terms, buffers),
        "activations": training.batch_size * _kept(student, work) * itemsize,
        "logits of a chunk": of_chunk(training, student.classes),
        "matchers": bytes_of(own)
        + sum(_kept_for(matcher, spec, models, work, itemsize) for matcher in matchers),
    }


def _kept_for(
    matcher: Any, spec: DistillSpec, models: TeacherAndStudent, work: Work, itemsize: int
) -> int:
    """Bytes that a matcher keeps: states, or queries, keys and the maps of a chunk.

    A teacher keeps nothing else for a backward pass; of a student they are copies, or gradients.
    """
    sizes = [sizes_of(models.student), sizes_of(models.teacher or models.student)]
    widths = sum(each.width for each in sizes) * len(matcher.pairs)
    rows = spec.training.batch_size * work.longest
    if not reads_attention(matcher):
        return rows * widths * itemsize
    chunk = chunk_on(process_device(), spec.training.chunk, models.student.classes)
    heads = sum(each.heads for each in sizes) * len(matcher.pairs)
    maps = min(chunk, work.longest) * work.longest * heads
    return 2 * rows * widths * itemsize + MAPS * 4 * maps


def seconds(
    spec: DistillSpec, models: TeacherAndStudent, work: Work, matchers: Iterable[Any] = ()
) -> dict[str, float]:
    """Estimate the time of a run.

    Args:
        spec: The distill spec.
        models: The models, which need no weights.
        work: The amount of work.
        matchers: The bound matchers.

    Returns:
        Purpose -> seconds.
    """
    training, autocast = spec.training, products_of(spec.training)
    rows = min(1024, max(1, round(training.batch_size * work.tokens)))
    width = describe_model(models.student).hidden or WIDTH

    def speed(model: LoadedModel, products: torch.dtype | None = None) -> float:
        return throughput(rows=rows, width=width, weights=model.model.dtype, products=products)

    def reading(model: LoadedModel | None, products: torch.dtype | None = None) -> float:
        return _forward(model.model, work) / speed(model, products) if model else 0.0

    def answering(model: LoadedModel | None, tokens: float) -> float:
        return generating(model, tokens, speed(model)) if model else 0.0

    student, live = models.student, [models.teacher, *models.several.values()]
    ours = reading(student, autocast)
    theirs = sum(reading(teacher, autocast) for teacher in live)
    matched = sum(_matching(matcher, models, work) for matcher in matchers)
    step = theirs + ours * (1 + 2 * work.streams) + matched / speed(student, autocast)
    read = rows_of(training, work.steps)
    asked = spec.data.on_policy
    samplers = [
        None if asked and asked.sampler else student,  # a server's time is not known
        models.teacher if asked and asked.reads_teacher else None,
    ]
    on_the_way = work.steps // training.eval_every if training.eval_every else 0
    measured = work.heldout * sum(map(reading, (student, *live)))
    return {
        "responses": answering(models.teacher or student, work.generated),
        "training": read * step,
        "auxiliary rows": work.beside * read * step,
        "sampling": sum(answering(model, work.sampled) for model in samplers),
        "probing": probed_rows(training, work.steps) * (theirs + ours * (1 + 2 * work.terms)),
        "measuring": (spec.evaluation.before + on_the_way + 1)
        * (measured + answering(student, work.answered)),
    }


def of_trained(
    training: TrainingSpec, size: int, streams: int, terms: int, buffers: int
) -> dict[str, int]:
    """Estimate the memory that trained weights need beside themselves.

    Args:
        training: The training spec.
        size: Bytes of the trained weights.
        streams: Backward passes per step.
        terms: Terms of the loss.
        buffers: Copies of the trained weights that the momentum policy keeps.

    Returns:
        Purpose -> bytes.
    """
    momenta = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return {
        "gradients": size * (streams + 1 if streams > 1 else 1),
        "probing": size * (probe_copies(terms) if training.probe_every else 0),
        "optimizer": size * momenta,
        "momentum policy": size * buffers,
    }


def of_chunk(training: TrainingSpec, classes: int) -> int:
    """Estimate the memory of the logits that exist at once, in bytes."""
    return chunk_on(process_device(), training.chunk, classes) * classes * 4 * LOGITS


def products_of(training: TrainingSpec) -> torch.dtype | None:
    """The dtype to which a step casts its matrix products; None: that of the weights."""
    return torch.bfloat16 if training.precision == "bf16" else None


def rows_of(training: TrainingSpec, steps: int) -> int:
    """The number of rows that a process reads in ``steps`` optimizer steps."""
    return steps * training.batch_size * training.accumulation


def probed_rows(training: TrainingSpec, steps: int) -> int:
    """The number of rows that the gradient probe reads in ``steps`` optimizer steps."""
    looks = steps // training.probe_every if training.probe_every else 0
    return looks * training.probe_batches * training.batch_size


def probe_copies(terms: int) -> int:
    """Copies of all gradients: mean and squares of each term, one batch's, and two temporaries."""
    return 2 * terms + 3


def generating(model: LoadedModel, tokens: float, speed: float) -> float:
    """Seconds to generate ``tokens`` tokens in large batches; ``speed``: see `throughput`."""
    return 2 * sum(p.numel() for p in model.model.parameters()) * tokens / (speed * DECODING)


@cache
def throughput(
    rows: int, width: int, weights: torch.dtype, products: torch.dtype | None = None
) -> float:
    """Measure a forward and a backward pass of an MLP block, with its norm, on this device.

    A product alone would say too much where it is fast: there casts, activations and the reading of
    weights take most of the time. It is measured once: the arms of a comparison differ in little
    else.

    Args:
        rows: Rows of its input, [rows, width].
        width: Their width; the block is four times as wide inside.
        weights: The dtype of its weights.
        products: The dtype to which autocast casts its products (default: that of the weights).

    Returns:
        Floating-point operations per second.
    """
    device = process_device()
    layers = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
    passes = Timer(
        "with autocast: (states + block(states)).sum().backward()",
        globals={
            "block": nn.Sequential(nn.LayerNorm(width), *layers).to(device, weights),
            "states": torch.ones(rows, width, dtype=weights, device=device),
            "autocast": torch.autocast(device.type, products, enabled=products is not None),
        },
        num_threads=torch.get_num_threads(),
    )
    seconds: list[float] = []
    until = time.monotonic() + 0.5
    while len(seconds) < 3 or time.monotonic() < until:
        seconds.append(passes.timeit(1).median)
    return 48 * rows * width * width / min(seconds)  # the minimum, as other programs may interfere


def _forward(model: Any, work: Work) -> float:
    """Operations of a forward pass over a mean row: two per weight and token.

    An image model uses a weight at many places, so its operations are counted in a pass.
    """
    if not _reads_tokens(model):
        with FlopCounterMode(display=False) as counter:
            _run_outline(model, work)
        return float(counter.get_total_flops())
    embeddings = {id(m.weight): m.weight for m in _ends(model)}
    body = sum(p.numel() for p in model.parameters()) - sum(e.numel() for e in embeddings.values())
    head = model.get_output_embeddings()
    at_head = head.weight.numel() * work.learned if head is not None else 0.0
    return float(2 * (body * work.tokens + at_head))


def _matching(matcher: Any, models: TeacherAndStudent, work: Work) -> float:
    """Operations of a matcher on a mean row: of its weights, or of maps and their gradients."""
    generates = models.student.model.can_generate()  # else all positions are compared
    compared = len(matcher.pairs) * (work.learned if generates else work.tokens)
    if not reads_attention(matcher):  # as if all pairs share the weights
        return float(6 * compared * sum(p.numel() for p in matcher.parameters()))
    of_map = 3 * sizes_of(models.student).width + sizes_of(models.teacher or models.student).width
    return float(2 * compared * work.tokens * of_map)


def _kept(loaded: LoadedModel, work: Work) -> int:
    """The number of values that one row keeps for the backward pass."""
    if _reads_tokens(loaded.model):
        facts = describe_model(loaded)
        return work.longest * facts.layers * facts.hidden * ACTIVATIONS
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run_outline(loaded.model, work)
    own = {parameter.untyped_storage()._cdata for parameter in loaded.model.parameters()}
    return sum(tensor.numel() for storage, tensor in kept.items() if storage not in own)


def _reads_tokens(model: Any) -> bool:
    return bool(model.main_input_name == "input_ids")


def _run_outline(model: Any, work: Work) -> None:
    """Run a forward pass over one row on the meta device, where tensors have sizes only."""
    model.eval()  # a batch norm in training mode refuses a single row
    try:
        model(**{name: tensor[None].to("meta") for name, tensor in work.inputs.items()})
    except (ValueError, RuntimeError) as fault:
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in work.inputs.items())
        raise UserError(
            f"{type(model).__name__} cannot read a row of the data ({shapes}): {fault}",
            "choose a model that accepts these shapes, e.g. change student.config.num_channels",
        ) from fault


def _ends(model: Any) -> list[Any]:
    """The input and output embeddings, which may share their weights."""
    return [
        m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    ]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The memory of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
