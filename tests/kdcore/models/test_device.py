"""What depends on a device: how many positions' logits are computed at once."""

from __future__ import annotations

import pytest
import torch

from kdcore.models import device

GB = 2**30
GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("memory", "classes", "expected"),
    [(140 * GB, 128_256, 6080), (8 * GB, 128_256, 320), (GB, 262_144, 64), (8 * GB, 100, 8192)],
)
def test_a_chunk_takes_a_share_of_the_memory_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, memory: int, classes: int, expected: int
) -> None:
    monkeypatch.setattr(device, "memory_of", lambda _: memory)
    assert device.chunk_on(GPU, None, classes) == expected
    assert device.chunk_on(GPU, 7, classes) == 7


def test_a_chunk_of_a_cpu_depends_on_nothing() -> None:
    assert device.memory_of(device.CPU) is None
    assert device.chunk_on(device.CPU, None, 128_256) == 512
