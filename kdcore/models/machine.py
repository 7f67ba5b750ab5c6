"""The machine that a measurement ran on: its processor or accelerator, threads and memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from kdcore.errors import counted
from kdcore.models.device import CPU, memory_of

MULTIPLY = re.compile(r"amx_\w+|avx2|avx512f|avx\w*_(bf16|fp16|vnni\w*)|asimddp|i8mm|bf16|sve2?")
"""Instructions of processors that decide how fast a product of small numbers is."""


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
