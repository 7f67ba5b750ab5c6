"""What the measurements were taken on: the device, the versions and the precision."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_check.models import precision
from gpu_check.section import Section
from gpu_check.sizes import Size
from kdcore.models.device import default_device

NAMES = ("device", "versions", "precision")
PACKAGES = ("kdcore", "torch", "transformers", "accelerate", "safetensors")


def measure(section: Section, size: Size) -> None:
    """Describe the machine.

    Args:
        section: The section for the entries of `NAMES`.
        size: Not used.
    """
    section.measure("device", _device)
    section.measure("versions", _versions)
    section.measure("precision", _precision)


def _device() -> dict[str, Any]:
    device = default_device()
    if device.type != "cuda":
        return {"type": device.type, "name": platform.processor() or platform.machine()}
    facts = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "visible": torch.cuda.device_count(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda}


def _precision() -> dict[str, str]:
    dtype = str(precision(default_device())).removeprefix("torch.")
    return {
        "teacher_and_target": dtype,
        "student": "float32" if dtype == "float32" else f"float32 weights, {dtype} autocast",
        "float32_products": torch.get_float32_matmul_precision(),
    }
