"""One optimizer step with a momentum buffer for each stream of gradients.

theta is one array; gradients, momenta and buffers are dictionaries by the stream's name. Every
function returns new arrays and changes none. A buffer that does not exist yet is 0.
"""

import math
from typing import NamedTuple

import numpy as np

Streams = dict[str, np.ndarray]


def deepkd_momenta(mu: float = 0.9, delta: float = 0.075) -> dict[str, float]:
    """Task and non-target at mu + delta, target at mu - delta."""
    return {"task": mu + delta, "target": mu - delta, "nontarget": mu + delta}


def dot_momenta(mu: float = 0.9, delta: float = 0.075) -> dict[str, float]:
    """DOT's two streams: task at mu - delta, distillation at mu + delta."""
    return {"task": mu - delta, "kd": mu + delta}


def heavy_ball(
    theta: np.ndarray,
    buffers: Streams,
    gradients: Streams,
    momenta: dict[str, float],
    lr: float,
    base_mu: float = 0.9,
    weight_decay: float = 0.0,
    gain_normalised: bool = False,
) -> tuple[np.ndarray, Streams]:
    """v_c <- g_c + mu_c v_c;  theta <- theta - lr (sum_c gain_c v_c + decay theta).

    gain_c is 1, or (1 - mu_c) / (1 - mu) where the gains are normalised: a buffer's steady
    state is g / (1 - mu_c), and with that factor every stream has the gain of the base mu.

    The decay enters no buffer. Its strength is weight_decay / (1 - mu): what a constant
    weight_decay * theta would come to in a buffer of the base mu.
    """
    new, step = {}, np.zeros_like(theta)
    for stream, gradient in gradients.items():
        mu = momenta[stream]
        new[stream] = gradient + mu * buffers.get(stream, np.zeros_like(theta))
        gain = (1 - mu) / (1 - base_mu) if gain_normalised else 1.0
        step = step + gain * new[stream]
    step = step + weight_decay / (1 - base_mu) * theta
    return theta - lr * step, new


def merged(gradients: Streams, momenta: dict[str, float]) -> tuple[Streams, dict[str, float]]:
    """Streams of equal momentum summed into one, named by joining their names with '+'."""
    sums, merged_momenta = {}, {}
    for mu in sorted({momenta[stream] for stream in gradients}):
        names = [stream for stream in gradients if momenta[stream] == mu]
        sums["+".join(names)] = sum(gradients[stream] for stream in names)
        merged_momenta["+".join(names)] = mu
    return sums, merged_momenta


def released(
    theta: np.ndarray,
    buffers: Streams,
    gradients: Streams,
    mu: float,
    delta_target: float,
    delta_nontarget: float,
    lr: float,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, Streams]:
    """A step of the released code, streams task, target and nontarget.

    The task's own delta does nothing: its buffer is multiplied by the target's momentum. Weight
    decay enters only the target's buffer, and is taken of parameters that the task and the
    non-target buffers have already moved. Deltas are signed: momentum = mu + delta.
    """
    target_mu, nontarget_mu = mu + delta_target, mu + delta_nontarget
    old = {stream: buffers.get(stream, np.zeros_like(theta)) for stream in gradients}
    task = gradients["task"] + target_mu * old["task"]
    theta = theta - lr * task
    nontarget = gradients["nontarget"] + nontarget_mu * old["nontarget"]
    theta = theta - lr * nontarget
    target = gradients["target"] + weight_decay * theta + target_mu * old["target"]
    theta = theta - lr * target
    return theta, {"task": task, "target": target, "nontarget": nontarget}


def released_dot(
    theta: np.ndarray,
    buffers: Streams,
    gradients: Streams,
    mu: float,
    delta: float,
    lr: float,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, Streams]:
    """A step of DOT's released code, streams task and kd.

    The task's buffer moves the parameters first. Weight decay enters that buffer alone, so it is
    taken of parameters that nothing has moved in this step.
    """
    old = {stream: buffers.get(stream, np.zeros_like(theta)) for stream in gradients}
    task = gradients["task"] + weight_decay * theta + (mu - delta) * old["task"]
    theta = theta - lr * task
    kd = gradients["kd"] + (mu + delta) * old["kd"]
    return theta - lr * kd, {"task": task, "kd": kd}


class AdamState(NamedTuple):
    """First moments by stream, the one second moment, and the steps taken."""

    first: Streams
    second: np.ndarray
    step: int


def adam_start(theta: np.ndarray, streams: list[str]) -> AdamState:
    """Zeros."""
    return AdamState({one: np.zeros_like(theta) for one in streams}, np.zeros_like(theta), 0)


def adamw(
    theta: np.ndarray,
    state: AdamState,
    gradients: Streams,
    beta1s: dict[str, float],
    lr: float,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, AdamState]:
    """AdamW with one first moment per stream.

    m_c <- beta1_c m_c + (1 - beta1_c) g_c;  s <- beta2 s + (1 - beta2) (sum_c g_c)^2;
    theta <- (1 - lr weight_decay) theta
             - lr sum_c m_c / (1 - beta1_c^n) / (sqrt(s / (1 - beta2^n)) + eps).
    """
    step = state.step + 1
    total = sum(gradients.values())
    second = beta2 * state.second + (1 - beta2) * total**2
    first, direction = {}, np.zeros_like(theta)
    for stream, gradient in gradients.items():
        beta1 = beta1s[stream]
        first[stream] = beta1 * state.first[stream] + (1 - beta1) * gradient
        direction = direction + first[stream] / (1 - beta1**step)
    denominator = np.sqrt(second / (1 - beta2**step)) + eps
    theta = theta - lr * weight_decay * theta - lr * direction / denominator
    return theta, AdamState(first, second, step)


def clipped_on_the_sum(gradients: Streams, max_norm: float) -> Streams:
    """All streams scaled by one factor, min(1, max_norm / ||sum_c g_c||): the sum's norm is
    clipped, the streams' proportions stay."""
    norm = math.sqrt(float((sum(gradients.values()) ** 2).sum()))
    factor = 1.0 if norm <= max_norm else max_norm / norm
    return {stream: factor * gradient for stream, gradient in gradients.items()}
