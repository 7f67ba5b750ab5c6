"""The machine and its devices: what is here, what a device can do, and what measurements name.

Everything else asks this module, or takes the device of a tensor that it was given.
"""

from __future__ import annotations

import os
import platform
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from kdcore.errors import UserError, counted, nearest

CPU = torch.device("cpu")

LOGITS = 6
"""Copies of a chunk's logits: of both models, their log-probs, and intermediate gradients."""
CHUNK = 512
"""Positions whose logits are computed at once on a CPU."""
MOST = 8192
"""The same on an accelerator at most: more makes no step shorter."""
SHARE = 1 / 8
"""Share of an accelerator's memory that a chunk's logits may take."""

MULTIPLY = re.compile(r"amx_\w+|avx2|avx512f|avx\w*_(bf16|fp16|vnni\w*)|asimddp|i8mm|bf16|sve2?")
"""Instructions of processors that decide how fast a product of small numbers is."""


def default_device() -> torch.device:
    """The accelerator where one is available, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or CPU


def process_device() -> torch.device:
    """This process's device among those that a launcher started; alone, the default device."""
    device: torch.device = PartialState().device
    return device


def chosen_device(name: str | None) -> torch.device:
    """The device of a name.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` and so on; None means the default device.

    Returns:
        The device.

    Raises:
        UserError: This machine has no such device.
    """
    if name is None:
        return default_device()
    known = [CPU.type]
    if (accelerator := default_device()) != CPU:
        numbered = (f"{accelerator.type}:{number}" for number in range(device_count()))
        known += [accelerator.type, *numbered]
    if name not in known:
        raise UserError(f"this machine has no device '{name}'", nearest(name, known))
    return torch.device(name)


def put(model: Any, device: torch.device) -> None:
    """Move a model to a device, unless it is there.

    A quantised model may refuse a move to where it is, and the name of a device may lack the number
    that ``model.device`` has.

    Args:
        model: A transformers model.
        device: The device.
    """
    unnumbered = device.index is None and device.type != CPU.type
    number = torch.accelerator.current_device_index() if unnumbered else device.index
    if model.device not in (device, torch.device(device.type, number)):
        model.to(device)


@lru_cache
def widest_float(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device: float64, or float32 where it has none (Apple's GPUs)."""
    try:
        torch.ones((), dtype=torch.float64, device=device) + 1
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the widest float dtype of its device."""
    return tensor.to(widest_float(tensor.device))


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; float64 becomes the widest float dtype there."""
    narrow = tensor.dtype == torch.float64
    return tensor.to(device, widest_float(device) if narrow else tensor.dtype)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; the host does not wait for the copy where it can pin memory.

    The caller must not write to the tensor afterwards: the device may read it later.
    """
    # Metal, which cannot, would read the source when it may be freed
    if tensor.device.type != CPU.type or not pins_memory(device):
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@lru_cache
def pins_memory(device: torch.device) -> bool:
    """Whether copies to a device can start from pinned (page-locked) memory of the host."""
    if device.type in (CPU.type, "mps"):
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


def device_count() -> int:
    """How many devices of the default kind this process sees; 1 for the CPU."""
    return 1 if default_device() == CPU else torch.accelerator.device_count()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work, so that a clock may be read."""
    if device.type != CPU.type:
        torch.accelerator.synchronize(device)


def memory_of(device: torch.device) -> int | None:
    """Total memory of an accelerator in bytes; None if it is unknown, and for the CPU."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    try:
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    except (AttributeError, RuntimeError):
        return None


def available_memory(device: torch.device) -> int:
    """Bytes that a device has for weights: an accelerator's total, or the memory that is free.

    Where the system does not say what is free, it is the total memory of the machine.

    Args:
        device: The device.

    Returns:
        The number of bytes.
    """
    if device.type != CPU.type and (total := memory_of(device)) is not None:
        return total
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def chunk_on(device: torch.device, asked: int | None, classes: int) -> int:
    """The number of positions whose logits are computed at once.

    The total memory counts, not the free one, so that a resumed run computes the same.

    Args:
        device: Device of the logits.
        asked: The number in the spec; None to choose one.
        classes: Number of classes V.

    Returns:
        The number in the spec; `CHUNK` without an accelerator of known memory; otherwise as many
        as fit into `SHARE` of it.
    """
    memory = memory_of(device)
    if asked is not None or memory is None:
        return asked or CHUNK
    fitting = int(memory * SHARE) // (classes * 4 * LOGITS)
    return max(64, min(MOST, fitting - fitting % 64))


def processor() -> str:
    """The name of the processor."""
    return processor_facts()[0]


def processor_facts() -> tuple[str, list[str]]:
    """What decides how fast a processor multiplies.

    Returns:
        Its name, and its instructions for products, e.g. avx512_bf16, amx_int8 or avx_vnni; none
        where the system does not list them.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return name, [flag for flag in flags if MULTIPLY.fullmatch(flag)]


def machine(device: torch.device) -> str:
    """Name a device as a reader of a measurement needs it.

    Args:
        device: The device.

    Returns:
        The accelerator's name, or the processor's with torch's number of threads.
    """
    if device.type == CPU.type:
        threads = torch.get_num_threads()
        return f"{processor()}, {counted(threads, 'thread')}"
    try:
        return str(getattr(torch, device.type).get_device_properties(device).name)
    except (AttributeError, RuntimeError):
        return str(device)


class Moment:
    """A place in a device's work: when it got there is known later, and nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == CPU.type:
            self._seconds = time.perf_counter()
        else:
            self._event = torch.Event(device, enable_timing=True)
            self._event.record()

    def until(self, later: Moment) -> float:
        """Seconds to a later moment of the same device, which must have passed both."""
        if self._event is None:
            return later._seconds - self._seconds
        return float(self._event.elapsed_time(later._event)) / 1000
