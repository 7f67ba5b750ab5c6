"""Drafters in vLLM's own methods: drafts equal to kdcore's, output unchanged.

vLLM normalises the keys of a DFlash's context in one call for all layers, with a row of weights for
each. The kernel of its build for CPUs (0.32) reads the first row for all of them, so that a DFlash
of several layers drafts otherwise there: not by rounding, the log-probs differ by up to 1. The
tests call the kernel for each layer instead, and the drafts are kdcore's. One test holds that the
fault exists; once it fails, delete it, the fixture and the limit in docs/howto/serving.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as kernels

from tests.engines.served import (
    NEW,
    PROMPTS,
    Served,
    compare_drafts,
    continued,
    drafter_in,
    target_in,
)

RMS_NORM = kernels.rms_norm
EPSILON = 1e-6


def norm_by_layer(out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """vLLM's kernel, called for each row of ``weight`` where it has several."""
    if weight.dim() == 1:
        return RMS_NORM(out, x, weight, epsilon)
    for layer, row in enumerate(weight):
        RMS_NORM(out[layer], x[layer], row, epsilon)


@pytest.fixture
def layers_have_own_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rms_norm", norm_by_layer)


def test_the_kernel_for_cpus_reads_one_row_of_weights() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 1, 32), torch.rand(2, 32) + 0.5
    normed = F.rms_norm(x, (32,), eps=EPSILON)
    theirs, by_layer = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(theirs, x, weight, EPSILON)
    norm_by_layer(by_layer, x, weight, EPSILON)
    torch.testing.assert_close(theirs, normed * weight[0])
    torch.testing.assert_close(by_layer, normed * weight[:, None, None])


@pytest.mark.usefixtures("layers_have_own_norms")
@pytest.mark.parametrize(
    ("name", "steps", "params"),
    [
        ("eagle3", 30, {"features": (1, 2, 3), "vocabulary": 90}),
        ("medusa", 30, {}),
        ("p_eagle", 30, {"features": (1, 3), "layers": 2}),
        ("p_eagle", 30, {"features": (1, 2, 3), "layers": 1, "vocabulary": 90}),
        ("dflash", 15, {"features": (1, 3), "layers": 2}),
        ("dflash", 15, {"features": (2,), "layers": 1, "vocabulary": 90}),
    ],
)
def test_drafts_and_output(
    name: str, steps: int, params: dict, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    target = target_in(tmp_path / "target")
    exported = drafter_in(tmp_path, target, name, steps, **params)
    served = serve(target.name, exported.settings)
    texts = served.generate(PROMPTS)
    assert list(texts.values()) == [each + continued(target, each, NEW) for each in PROMPTS]
    assert compare_drafts(served, exported, target, texts) > NEW
    assert 0 < served.metric("accepted_tokens") < served.metric("draft_tokens")
