"""The signal-to-noise ratio of a stream's gradients."""

import math

import numpy as np
import pytest
import torch

from kdcore.training.trainer.probe import GSNR
from tests.reference.deepkd.gsnr import gsnr as reference


def ratios(*batches: list[torch.Tensor]) -> list[float]:
    estimate = GSNR()
    for batch in batches:
        estimate.add(batch)
    return estimate.ratios()


def test_constant_gradients_are_all_signal_and_zeros_are_neither():
    steady = [torch.tensor([0.1, -0.3]), torch.zeros(3)]
    constant, nothing = ratios(*[steady] * 16)
    assert constant == math.inf
    assert math.isnan(nothing)


def test_each_layer_is_the_formula():
    random = np.random.default_rng(0)
    samples = random.normal(size=(16, 12)) + random.normal(size=12)
    batches = [[torch.tensor(row[:8]).reshape(2, 4), torch.tensor(row[8:])] for row in samples]
    expected = [reference(samples[:, :8]), reference(samples[:, 8:])]
    assert ratios(*batches) == pytest.approx(expected)
    together = GSNR()
    for batch in batches:
        together.add(batch)
    assert together.ratio() == pytest.approx(reference(samples))


def test_layers_are_the_formula_over_their_tensors():
    samples = np.random.default_rng(1).normal(size=(16, 12))
    estimate = GSNR()
    for row in samples:
        estimate.add([torch.tensor(row[:3]), torch.tensor(row[3:8]), torch.tensor(row[8:])])
    expected = {"a": reference(samples[:, np.r_[0:3, 8:12]]), "b": reference(samples[:, 3:8])}
    assert estimate.by_layer(["a", "b", "a"]) == pytest.approx(expected)


@pytest.mark.parametrize("batches", [16, 64])
def test_noise_is_near_0_and_a_known_mixture_near_its_ratio(batches: int):
    """Summands that are clamped one by one would give 0.48 / M: 0.03 for 16 batches."""
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(20_000, generator=generator)] for _ in range(batches)]
    (noise,) = ratios(*batches)
    assert 0 <= noise < 0.1 / len(batches)
    (mixture,) = ratios(*[[0.5 * layer + 1] for (layer,) in batches])
    assert mixture == pytest.approx(4, rel=0.02)


def test_the_estimate_keeps_no_hold_on_what_it_is_given():
    batches = [[torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 2.5])]]
    estimate = GSNR()
    for (layer,) in batches:
        estimate.add([layer])
        layer.zero_()
    assert estimate.ratios() == ratios([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 2.5])])


def test_one_batch_has_no_variance():
    with pytest.raises(ValueError, match="two mini-batches"):
        ratios([torch.ones(2)])
