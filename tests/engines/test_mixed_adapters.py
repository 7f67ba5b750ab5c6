"""A fault of vLLM 0.32's adapters on CPUs, which docs/howto/serving.md states.

Once this test fails, delete it and the statement.
"""

from __future__ import annotations

import torch
from vllm.lora.ops.torch_ops import bgmv_expand


def test_a_request_without_adapter_gets_one_in_a_mixed_batch() -> None:
    """The number of no adapter, -1, is read as the last adapter's place."""
    adapters = torch.ones(1, 2, 3)  # of one adapter, [adapters, out, rank]
    out = torch.zeros(2, 2)
    bgmv_expand(torch.ones(2, 3), adapters, out, torch.tensor([0, -1]))
    assert out.tolist() == [[3.0, 3.0], [3.0, 3.0]]
