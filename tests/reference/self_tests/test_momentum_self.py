"""The reference momentum policies against torch's optimizers and against each other."""

import math

import numpy as np
import pytest
import torch

from tests.reference.deepkd import momentum
from tests.reference.deepkd.gsnr import gsnr

SHAPE = (3, 2)
STREAMS = ["task", "target", "nontarget"]
STEPS = 12


@pytest.fixture
def theta() -> np.ndarray:
    return np.random.default_rng(2).normal(size=SHAPE)


@pytest.fixture
def gradients() -> list[dict[str, np.ndarray]]:
    """One dictionary for each step."""
    random = np.random.default_rng(3)
    return [{stream: random.normal(size=SHAPE) for stream in STREAMS} for _ in range(STEPS)]


def after_heavy_ball(theta, gradients, momenta, **options):
    buffers = {}
    for one in gradients:
        theta, buffers = momentum.heavy_ball(theta, buffers, one, momenta, 0.1, **options)
    return theta


def after_adamw(theta, gradients, beta1s, **options):
    state = momentum.adam_start(theta, list(beta1s))
    for one in gradients:
        theta, state = momentum.adamw(theta, state, one, beta1s, 0.1, **options)
    return theta


def after_torch(theta, gradients, build):
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimizer = build([parameter])
    for one in gradients:
        parameter.grad = torch.tensor(sum(one.values()))
        optimizer.step()
    return parameter.detach().numpy()


def test_equal_momenta_reproduce_torch_sgd(theta, gradients):
    ours = after_heavy_ball(theta, gradients, dict.fromkeys(STREAMS, 0.9))
    sgd = after_torch(theta, gradients, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert ours == pytest.approx(sgd, abs=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equal_beta1_reproduces_torch_adamw(weight_decay, theta, gradients):
    ours = after_adamw(theta, gradients, dict.fromkeys(STREAMS, 0.8), weight_decay=weight_decay)
    torchs = after_torch(
        theta,
        gradients,
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.999), weight_decay=weight_decay),
    )
    assert ours == pytest.approx(torchs, abs=1e-12)


@pytest.mark.parametrize("after", [after_heavy_ball, after_adamw])
def test_equal_momenta_are_one_buffer(after, theta, gradients):
    one_stream = [{"all": sum(one.values())} for one in gradients]
    three = after(theta, gradients, dict.fromkeys(STREAMS, 0.8))
    assert three == pytest.approx(after(theta, one_stream, {"all": 0.8}), abs=1e-13)


@pytest.mark.parametrize("after", [after_heavy_ball, after_adamw])
def test_merged_streams_are_three_buffers(after, theta, gradients):
    momenta = momentum.deepkd_momenta()
    merged = [momentum.merged(one, momenta) for one in gradients]
    assert sorted(merged[0][1]) == ["target", "task+nontarget"]
    two = after(theta, [one for one, _ in merged], merged[0][1])
    three = after(theta, gradients, momenta)
    assert two == pytest.approx(three, abs=1e-13)
    assert np.abs(three - after(theta, gradients, dict.fromkeys(STREAMS, 0.9))).max() > 1e-2


def test_gains_of_the_steady_state(theta):
    ones = {stream: np.ones(SHAPE) for stream in STREAMS}
    momenta = momentum.deepkd_momenta()
    buffers = {}
    for _ in range(2000):
        _, buffers = momentum.heavy_ball(theta, buffers, ones, momenta, 0.1)
    gains = {stream: buffer[0, 0] for stream, buffer in buffers.items()}
    assert gains == pytest.approx({"task": 40, "target": 1 / 0.175, "nontarget": 40})
    plain, _ = momentum.heavy_ball(theta, buffers, ones, momenta, 0.1)
    assert theta - plain == pytest.approx(0.1 * (80 + 1 / 0.175))
    normalised, _ = momentum.heavy_ball(theta, buffers, ones, momenta, 0.1, gain_normalised=True)
    assert theta - normalised == pytest.approx(0.1 * 3 * 10)


def test_gain_normalisation_of_the_base_momentum_changes_nothing(theta, gradients):
    momenta = dict.fromkeys(STREAMS, 0.9)
    normalised = after_heavy_ball(theta, gradients, momenta, gain_normalised=True)
    assert (normalised == after_heavy_ball(theta, gradients, momenta)).all()


def test_weight_decay_enters_no_buffer_and_has_the_strength_of_the_base_momentum(theta):
    zeros = {stream: np.zeros(SHAPE) for stream in STREAMS}
    options = {"momenta": momentum.deepkd_momenta(), "lr": 0.1, "weight_decay": 0.05}
    decayed, buffers = momentum.heavy_ball(theta, {}, zeros, **options)
    assert all((buffer == 0).all() for buffer in buffers.values())
    assert decayed == pytest.approx((1 - 0.1 * 0.05 / 0.1) * theta)

    # In torch the decay is in the buffer; with a tiny rate theta stays put, and a step in the
    # steady state is as long as ours.
    parameter = torch.nn.Parameter(torch.tensor(theta))
    sgd = torch.optim.SGD([parameter], lr=1e-9, momentum=0.9, weight_decay=0.05)
    for _ in range(500):
        before = parameter.detach().clone()
        parameter.grad = torch.zeros(SHAPE, dtype=torch.float64)
        sgd.step()
    step = (before - parameter.detach()).numpy()
    options["lr"] = 1e-9
    ours = theta - momentum.heavy_ball(theta, {}, zeros, **options)[0]
    assert ours == pytest.approx(step, rel=1e-5)


def after_released(theta, gradients, **options):
    buffers = {}
    for one in gradients:
        theta, buffers = momentum.released(theta, buffers, one, 0.9, -0.075, 0.05, 0.1, **options)
    return theta


def test_released_variant_is_dot_with_the_task_joined_to_the_target(theta, gradients):
    joined = [{"task": one["task"] + one["target"], "kd": one["nontarget"]} for one in gradients]
    dot = after_heavy_ball(theta, joined, {"task": 0.825, "kd": 0.95})
    assert after_released(theta, gradients) == pytest.approx(dot, abs=1e-13)
    assert momentum.dot_momenta() == pytest.approx({"task": 0.825, "kd": 0.975})
    paper = after_heavy_ball(theta, gradients, momentum.deepkd_momenta())
    assert np.abs(after_released(theta, gradients) - paper).max() > 1e-2


def test_released_weight_decay_is_in_the_target_buffer_alone(theta, gradients):
    one = gradients[0]
    _, plain = momentum.released(theta, {}, one, 0.9, -0.075, 0.05, 0.1)
    _, decayed = momentum.released(theta, {}, one, 0.9, -0.075, 0.05, 0.1, weight_decay=0.3)
    moved = theta - 0.1 * (one["task"] + one["nontarget"])
    assert (decayed["task"] == plain["task"]).all()
    assert (decayed["nontarget"] == plain["nontarget"]).all()
    assert decayed["target"] - plain["target"] == pytest.approx(0.3 * moved)


def test_clipping_is_on_the_sum_and_keeps_proportions(gradients):
    one = gradients[0]
    norm = np.linalg.norm(sum(one.values()))
    clipped = momentum.clipped_on_the_sum(one, norm / 4)
    assert np.linalg.norm(sum(clipped.values())) == pytest.approx(norm / 4)
    for stream in STREAMS:
        assert clipped[stream] == pytest.approx(one[stream] / 4)
        assert (momentum.clipped_on_the_sum(one, 2 * norm)[stream] == one[stream]).all()


def test_gsnr_of_constants_noise_and_a_known_mixture():
    random = np.random.default_rng(4)
    assert gsnr(np.tile(random.normal(size=5), (16, 1))) == math.inf
    assert math.isnan(gsnr(np.zeros((16, 5))))
    # Two mini-batches: means 2, 0.5 and variances 2, 4.5; the second is below its own noise, which
    # is taken off the sum.
    signal = (4 - 2 / 2) + (0.25 - 4.5 / 2)
    assert gsnr(np.array([[1.0, 2.0], [3.0, -1.0]])) == pytest.approx(signal / (2 + 4.5))
    noise = random.normal(size=(400, 100))
    assert gsnr(noise) < 0.01
    assert gsnr(0.5 * noise + 2) == pytest.approx(16, rel=0.05)
