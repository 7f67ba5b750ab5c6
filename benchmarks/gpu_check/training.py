"""Step time and peak memory of methods that train the same student, as ratios over SFT."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
from distillation_step import METHODS, Arm

from gpu_check.models import precision, random_llama
from gpu_check.section import Section
from gpu_check.sizes import Size
from kdcore.data.rows import batch_of
from kdcore.method.records import Batch
from kdcore.models.device import default_device
from kdcore.training.model_view import ModelView

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"terms": {"task": 1.0, "kd": 0.0}},
    "kd": METHODS["kd"],
    "speckd": METHODS["speckd"],
    "deepkd": METHODS["deepkd"],
}
NAMES = ("batch", *ARMS)


def measure(section: Section, size: Size) -> None:
    """Train a new student by each method.

    SFT comes first and has no teacher: the peak memory of the others includes the teacher's
    weights.

    Args:
        section: The section for the entries of `NAMES`.
        size: The models, the batch and the number of steps.
    """
    device = default_device()
    dtype = precision(device)
    given = batch_of_noise(size, device)
    section.measure("batch", lambda: _described(size, given))
    section.measure("sft", lambda: _steps(ARMS["sft"], size, given, None))
    sft = section.entries["sft"]
    teacher: Any = None

    def with_teacher(name: str) -> dict[str, Any]:
        nonlocal teacher
        if teacher is None:
            teacher = random_llama(size.teacher, device, dtype).requires_grad_(False)
        return _over(_steps(ARMS[name], size, given, teacher), sft)

    for name in ARMS:
        if name != "sft":
            section.measure(name, lambda name=name: with_teacher(name))


def batch_of_noise(size: Size, device: torch.device) -> Batch:
    """Rows of random tokens, of which the first half of each is not learned."""
    generator = torch.Generator().manual_seed(0)
    classes = size.teacher["vocab_size"]
    tokens = torch.randint(classes, (size.rows, size.length + 1), generator=generator)
    ids = tokens[:, :-1].contiguous()
    padded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": tokens[:, 1:].contiguous(),
        "mask": (torch.arange(size.length) >= size.length // 2).repeat(size.rows, 1),
        "index": torch.arange(size.rows),
    }
    return batch_of(padded, device)


def _described(size: Size, given: Batch) -> dict[str, Any]:
    return {
        "rows": size.rows,
        "positions": size.length,
        "learned_positions": int(given.mask.sum()),
        "teacher": size.teacher,
        "student": size.student,
    }


def _steps(method: dict[str, Any], size: Size, given: Batch, teacher: Any) -> dict[str, Any]:
    """Train a student for a few steps.

    Returns:
        The seconds of the timed steps, the memory that torch had allocated at the peak of all
        steps (null on a CPU), and the loss of the last one.
    """
    device = given.labels.device
    dtype = precision(device)
    gc.collect()  # the students of earlier methods
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    classes = size.teacher["vocab_size"]
    arm = Arm(
        method,
        random_llama(size.student, device, torch.float32, seed=1).train(),
        classes,
        fused=True,  # as the Trainer does
        autocast=None if dtype == torch.float32 else dtype,
    )
    view = None if teacher is None else ModelView(teacher, classes)
    seconds = [arm.step(given, view, teacher) for _ in range(size.warm_up + size.steps)]
    timed = seconds[size.warm_up :]
    return {
        "median_seconds": statistics.median(timed),
        "seconds": timed,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "loss": arm.loss,
    }


def _over(found: dict[str, Any], sft: Any) -> dict[str, Any]:
    """The same entry with its ratios over SFT; null where SFT failed or the value is null."""
    for ratio, name in {"time_over_sft": "median_seconds", "memory_over_sft": "peak_bytes"}.items():
        one = sft.get(name) if isinstance(sft, dict) else None
        found[ratio] = found[name] / one if found[name] and one else None
    return found
